import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # contract.py, whatever import mode pytest runs in
torch.set_num_threads(1)  # tensors this small lose more to threads than they gain
