"""What torch compiles in one graph."""

import torch
from packaging.version import Version


def in_one_graph(model):
    """The PEFT model; before torch 2.7, whose compiler does not enter PEFT's own forward pass, the network in it."""
    return model if Version(torch.__version__) >= Version("2.7") else model.get_base_model()
