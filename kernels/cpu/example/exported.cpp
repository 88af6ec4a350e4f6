// Run a denoiser that negengine.export has packaged, without Python: exported PACKAGE INPUTS OUTPUT
// INPUTS: a list of tensors, in the order of the denoiser's inputs, as torch.save writes it; the output goes to OUTPUT likewise.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

static std::vector<char> bytes_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: " << arguments[0] << " PACKAGE INPUTS OUTPUT\n";
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    std::vector<at::Tensor> inputs;
    const c10::IValue given = torch::jit::pickle_load(bytes_of(arguments[2]));
    for (const auto& value : given.toListRef()) inputs.push_back(value.toTensor());
    torch::inductor::AOTIModelPackageLoader denoiser(arguments[1]);
    const std::vector<at::Tensor> outputs = denoiser.run(inputs);
    const std::vector<char> pickled = torch::jit::pickle_save(c10::IValue(outputs.at(0)));
    std::ofstream(arguments[3], std::ios::binary).write(pickled.data(), static_cast<std::streamsize>(pickled.size()));
    std::cout << "wrote " << outputs.at(0).sizes() << " to " << arguments[3] << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
