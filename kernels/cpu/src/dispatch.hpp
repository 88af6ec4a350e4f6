// Which instruction set is used.
#pragma once

#include "kernels.hpp"

namespace negengine {

int isa();                  // see enum negengine_isa
const char* isa_name(int);  // null if there is none such
bool set_isa(int);          // false if the processor or the build lacks it
Kernels kernels();          // of the instruction set in use

}  // namespace negengine
