"""The only door to mlx_lm: loading, tokenizing, generating, training, timing.

Device differences live here too. On Metal (and CUDA) models compute in their own dtype with the stock layers. On the
CPU backend every matrix is expanded to float32 for the length of one call (see packed.Float32Linear), and
mx.compile, which shells out to a C++ compiler there, is off. Products of float32 matrices are really computed in
float32: by default MLX rounds their factors to ten bits on CUDA and on Macs from the M5 on, which would end up in every
Gram matrix. The Metal side has never been run so far.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read by MLX at its first product

import mlx.core as mx
import mlx.nn as nn

from . import blas, cpu_math
from .arch import Architecture, both_rope_spellings
from .base.errors import PareError, Refused, Unsupported
from .base.plain_path import plain, require_text
from .base.untrusted import read_json
from .model import tokenizer_files
from .model.checkpoint import Checkpoint, require_directory
from .model.weight_files import read_headers, without_leftovers
from .sources.open_model import opened
from .tensors.packing import Packing


def cpu_backend() -> bool:
    """Whether MLX computes on the CPU here, as on Linux without CUDA."""
    return mx.default_device().type == mx.DeviceType.cpu


if cpu_backend():
    mx.disable_compile()


def swift(kept: int = 0) -> AbstractContextManager[None]:
    """For walks, measurements and training: on the CPU backend numpy computes exponentials and attention, unless that
    would keep too much. ``kept``: bytes, as ``swift_kept`` says, where gradients are taken."""
    return cpu_math.swift(kept <= cpu_math.MOST_KEPT) if cpu_backend() else nullcontext()


def swift_kept(arch: Architecture, tokens: int, blocks: int = 1) -> int:
    """Bytes that gradients through so many blocks keep of ``tokens`` under ``swift``."""
    return blocks * cpu_math.kept_bytes(arch.largest("ffn"), arch.sizes["hidden"], tokens)


def load(path: Path, lazy: bool = True) -> nn.Module:
    """The stock mlx-lm model, weights unread when ``lazy``; never executes code from the model directory."""
    from mlx_lm.utils import load_model

    require_text(path := opened(path))
    config = both_rope_spellings(read_json(path / "config.json", "model config"))
    if (code := config.get("model_file")) is not None:
        raise Unsupported(
            f"{path} needs its own code to be run ({str(code)[:80]}), which is never done",
            "take a model that stock mlx-lm has a class for",
        )
    entries = read_headers(path)  # mlx reads the same files, and believes them
    blas.fit(config.get("hidden_size"))
    with without_leftovers(path, entries) as whole, plain(whole) as name:
        try:
            model, _ = load_model(name, lazy=lazy, model_config=config)
        except Exception as error:  # whatever a config that means nothing leads to
            raise PareError(f"mlx-lm cannot load {path}: {_said(error, name, path)}") from error
    return model


def _said(error: BaseException, name: Path, path: Path) -> str:
    """The words of an error, with the path that the user knows."""
    return str(error).replace(str(name), str(path))


def load_stock(path: Path) -> nn.Module:
    """The model as mlx-lm itself would run it, in memory; on the CPU backend in float32, which is faster there."""
    model = load(path)
    if cpu_backend():
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def for_backend(module: nn.Module) -> nn.Module:
    """The module as it should compute on this device."""
    if not cpu_backend():
        return module
    from .tensors.packed import to_float32

    return to_float32(module)


def packed(module: nn.Module, packing: Packing, dtype: mx.Dtype | None = None) -> nn.Module:
    """A linear layer of a streamed block with its matrix packed anew, in this dtype (None: that of the layer), as it
    should compute on this device."""
    from .tensors.packed import packed_layer

    return for_backend(packed_layer(getattr(module, "inner", module), packing, dtype))


def dequantized(model: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A resident dense copy of a model, for training in full or on the CPU backend."""
    from mlx_lm.utils import dequantize_model

    def widen(m: nn.Module) -> None:
        if "biases" in m:  # in the other modes bfloat16, which mlx-lm asks for, holds the very values
            m.scales, m.biases = m.scales.astype(mx.float32), m.biases.astype(mx.float32)

    model.apply_to_modules(lambda _, m: widen(m))
    model = dequantize_model(model)
    model.apply(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a)
    return model


def tokenizer(path: Path, date: str | None = None) -> Any:
    """mlx-lm's wrapper around a directory's tokenizer. Another process tries the files first, and writes chats
    (model/tokenizer_files.py).

    Args:
        path: The model directory.
        date: The day, YYYY-MM-DD, that chat templates are told. Default: today.

    Raises:
        PareError: The files are damaged, want code to be run, or are beyond bounds.
    """
    require_text(path := opened(path))
    require_directory(path)
    tokenizer_files.check(path)
    found = stock_tokenizer(path)
    found.apply_chat_template = tokenizer_files.Chats(path, date)
    return found


def stock_tokenizer(path: Path) -> Any:
    """mlx-lm's own, which runs the template of the model in this process."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of model types that it does not know: ours need its tokenizers alone
    with plain(path) as name:
        try:
            # said, because transformers otherwise asks at the terminal whether it may run the model's code
            return load_tokenizer(name, {"trust_remote_code": False})
        except BaseException as error:  # damaged files: bare Exceptions, and panics of Rust, which are none
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise PareError(
                f"cannot load the tokenizer of {path}: {_said(error, name, path)}",
                "tokenizer.json and tokenizer_config.json must be whole",
            ) from error


VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
# what tokenizers differ in
SAMPLE = "It's 3,141.59 — don't\n\n\tfor (int i = 0; i < n; ++i) { naïve Größe 日本語 🙂 }"


def convert(model: Path, out: Path, packing: Packing, predicate: Callable[[str, Any], dict] | None) -> None:
    """mlx_lm.convert: the same model packed, lazily; ``predicate``: module path -> packing, where it is not the same
    for all. Raises PareError where mlx-lm cannot."""
    from importlib import import_module

    load(model), tokenizer(model)  # tried before: mlx-lm itself believes the files
    whole = without_leftovers(model, read_headers(model))
    with whole as place, plain(place) as name, redirect_stdout(io.StringIO()):
        try:
            import_module("mlx_lm.convert").convert(
                str(name),
                str(out),
                quantize=True,
                q_bits=packing.bits,
                q_group_size=packing.group_size,
                quant_predicate=predicate,
            )
        except (ValueError, OSError, KeyError) as error:
            raise PareError(f"mlx-lm cannot pack {model}: {_said(error, name, model)}") from error


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two directories read a text as the same tokens; their files may be written differently, as mlx_lm.convert
    does. Raises PareError where a tokenizer cannot be loaded."""
    files = [Path(path) / "tokenizer.json" for path in (one, other)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    a, b = tokenizer(one), tokenizer(other)
    return a.get_vocab() == b.get_vocab() and a.encode(SAMPLE) == b.encode(SAMPLE)


def require_same_tokens(model: Path, other: Path) -> None:
    """Raises Refused when two models read a text as different tokens, or know different numbers of them: what one says
    of a token then means nothing to the other. Without tokenizer files on both sides only the numbers are compared."""
    found = [Checkpoint(path) for path in (model, other)]
    sizes = [checkpoint.arch.sizes["vocab"] for checkpoint in found]
    cure = "use a model of the same family, whose tokenizer.json is the same"
    if sizes[0] != sizes[1]:
        raise Refused(f"{other} has another vocabulary, {sizes[1]} tokens, than {model}, {sizes[0]} tokens", cure)
    without = [c.path for c in found if not any(file.name in VOCABULARIES for file in c.tokenizer_files())]
    if len(without) == 1:
        raise Refused(f"{without[0]} has no tokenizer: it may be another tokenizer", "put its tokenizer files there")
    if not without and not same_tokens(model, other):
        raise Refused(f"{other} has another tokenizer than {model}", cure)


def body(model: nn.Module) -> nn.Module:
    """The model up to its final norm, without the head."""
    return model.transformer if "transformer" in model else model.model  # openelm has names of its own


def blocks(model: nn.Module) -> list:
    """The list of transformer blocks itself, so that entries can be replaced."""
    return body(model).layers


def embedding(model: nn.Module) -> nn.Module:
    """The table of token embeddings."""
    inner = body(model)
    return inner.token_embeddings if "token_embeddings" in inner else inner.embed_tokens


def put_embedding(model: nn.Module, embedding: Callable[[mx.array], mx.array]) -> None:
    """Give the model's body another table of token embeddings, which its head does not see."""
    inner = body(model)
    setattr(inner, "token_embeddings" if "token_embeddings" in inner else "embed_tokens", embedding)


def head(model: nn.Module) -> nn.Module:
    """What makes logits of hidden states: a matrix of its own, or the embedding."""
    own = getattr(model, "lm_head", None)
    return embedding(model) if own is None else own


def logit_shape(model: nn.Module) -> tuple[float, float | None]:
    """What the model does with the product of hidden states and head: a factor, and a soft cap or None. The attributes
    are those of mlx_lm/models/granite.py and gemma2.py."""
    return 1 / getattr(model, "logits_scaling", 1.0), getattr(model, "final_logit_softcapping", None)


def generate(model: nn.Module, tok: Any, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """Text that stock mlx_lm.generate writes after ``prompt``."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    ids = tok.encode(prompt)
    pieces = [
        r.text for r in stream_generate(model, tok, ids, max_tokens=max_tokens, sampler=make_sampler(temperature))
    ]
    return "".join(pieces)


def continued(model: nn.Module, tokens: mx.array, length: int, key: mx.array) -> mx.array:
    """Rows [b, n] of a resident model's own, continued to ``length`` tokens by sampling at temperature 1, all at once
    with mlx-lm's KV cache. An end of text is a token like others: the row goes on behind it, as rows of text do."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, pieces, now = make_prompt_cache(model), [tokens], tokens[:, -1:]
    if tokens.shape[1] > 1:
        model(tokens[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache if layer is not None])  # not the logits, which nobody needs
    for draw in mx.random.split(key, length - tokens.shape[1]):
        logits = model(now, cache=cache)[:, -1].astype(mx.float32)
        now = mx.random.categorical(logits, key=draw)[:, None].astype(tokens.dtype)
        mx.async_eval(now)
        pieces.append(now)
    return mx.concatenate(pieces, axis=1)


def speed(model: nn.Module, tok: Any, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """One trial of mlx_lm's stream_generate on random tokens: prefill and decode tok/s, peak memory in bytes."""
    from mlx_lm import stream_generate

    prompt = mx.random.randint(0, tok.vocab_size, (prompt_tokens,)).tolist()
    mx.reset_peak_memory()
    eos, tok._eos_token_ids = tok._eos_token_ids, set()
    try:
        last = None
        for last in stream_generate(model, tok, prompt, max_tokens=new_tokens):  # noqa: B007 only the last response counts
            pass
    finally:
        tok._eos_token_ids = eos
    return {
        "prefill_tokens_per_s": last.prompt_tps,
        "decode_tokens_per_s": last.generation_tps,
        "peak_bytes": mx.get_peak_memory(),
    }


def add_lora(model: nn.Module, rank: int, scale: float, dora: bool = False) -> None:
    """Freeze the model and put LoRA (or DoRA) adapters on every linear layer of every block (mlx_lm.tuner)."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(blocks(model)), {"rank": rank, "scale": scale, "dropout": 0.0}, use_dora=dora)


def fused(module: nn.Module) -> mx.array:
    """The dense weight [out, in] of a linear layer with its adapter folded in."""
    return module.fuse(dequantize=True).weight


def each_block(model: nn.Module, call: Callable[[Callable], Callable]) -> None:
    """Give every block another ``__call__``, made by ``call`` from its own: these blocks alone, other models of the
    same class keep theirs. Names of parameters stay."""
    for block in blocks(model):
        cls = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"__call__": call(cls.__call__)})


def checkpointed(call: Callable) -> Callable:
    """A block's ``__call__`` that keeps none of its activations for the gradient, but computes them again
    (mlx_lm.tuner.trainer.grad_checkpoint does this to the class, and anew at every call). Only in training: a model
    that is evaluated or samples takes no gradient, and has a cache, which is no array."""

    def again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return call(block, *args, **kwargs)

        def inner(parameters: dict, *args: Any, **kwargs: Any) -> Any:
            block.update(parameters)
            return call(block, *args, **kwargs)

        return mx.checkpoint(inner)(block.trainable_parameters(), *args, **kwargs)

    return again


def train(
    model: nn.Module,
    optimizer: Any,
    loss: Callable,
    batches: Callable[[], Iterator[tuple]],
    steps: int,
    accumulate: int,
    report_every: int,
    on_report: Callable[[dict], None],
) -> None:
    """``steps`` updates by mlx_lm.tuner.trainer.train with our loss and our batches, ``accumulate`` of them for each.

    ``batches`` yields the tuples that ``loss(model, *batch) -> (mean, ntoks)`` takes; ``on_report`` gets mlx-lm's own
    training record, which counts batches.
    """
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train as run

    class Callback(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            on_report(info)

    with TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):  # its own progress display; ours reports
        discarded = (
            Path(directory) / "adapters.safetensors"
        )  # mlx-lm saves at the end; mx adds this suffix to any other
        discarded.symlink_to(os.devnull)
        args = TrainingArgs(
            batch_size=1,
            iters=steps * accumulate,
            steps_per_report=report_every * accumulate,
            steps_per_eval=steps * accumulate + 1,
            steps_per_save=steps * accumulate + 1,
            grad_accumulation_steps=accumulate,
            adapter_file=str(discarded),
        )
        run(
            model,
            optimizer,
            train_dataset=[None],
            val_dataset=None,
            args=args,
            loss=loss,
            iterate_batches=lambda **_: batches(),
            training_callback=Callback(),
        )


def greedy(model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """The likeliest token after ``tokens``, ``count`` times, by a resident model with mlx-lm's KV cache."""
    from mlx_lm.generate import generate_step

    found = generate_step(mx.array(tokens), model, max_tokens=count)
    return [int(token) for token, _ in found]
