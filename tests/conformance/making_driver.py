"""Run by the oracle's own Python: one request, as JSON on stdin, for a program of mergekit or for PEFT.

`{"program": "extract_lora", "arguments": […]}` runs a script of mergekit. `{"base": …, "adapter": …, "out": …}` loads
an adapter with PEFT, merges it, and saves the state dict in float32.
"""

import json
import sys

import torch
from safetensors.torch import save_file


def merge_adapter(base, adapter, out):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    state = loaded.merge_and_unload().state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, out)


def main():
    for request in json.load(sys.stdin):
        if "adapter" in request:
            merge_adapter(**request)
            continue
        from importlib import import_module

        script = import_module(f"mergekit.scripts.{request['program']}")
        script.main(request["arguments"], standalone_mode=False)


main()
