"""The engine that runs everywhere: a causal language model of transformers, on a GPU or on a CPU, for long prompts.

Speed: prompts are prefilled one row at a time, without padding, in chunks of constant size, from the keys
and values that the row before it left (`packing`); questions about one haystack, and samples of one prompt, are one
row, whose trunk is read once a step for all of them. Decoding is one step at a time for all rows in memory set aside
once (`kv_cache`); a row that has ended leaves its place to the next (`decoding`), and only decoding computes logits.

Promises: the token ids are those of the whole prompt; no prompt sees padding; near ties aside (a kernel rounds the last
bit by the shape it is given) an answer does not depend on its neighbours, nor on the limits. Which prompts are decoded
beside each other depends on the prompts and on where answers end: one model asked the same prompts again, under the
same limits on the same device with as many threads, says the same to the last bit, and two models differ beyond
themselves by near ties alone. A sampled token depends on the seed, its number in the answer and the logits
(`sampling`).

Refused: code from a checkpoint (`trust_remote_code`), recurrent and encoder-decoder models.
"""

from __future__ import annotations

import difflib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from jobs.errors import BadInput, MergeyardError
from workers import half_products
from workers.checkpoints.configs import rope, stretched
from workers.engines import attention
from workers.engines.decoding import Growing, Slots, answer_of
from workers.engines.engine import (
    Answer,
    Progress,
    Prompt,
    check_room,
    check_window,
    longest_scored,
)
from workers.engines.kv_cache import KeyValueBuffer, hidden
from workers.engines.packing import Pool, Row, common_prefix, make_rows, pools, smaller
from workers.engines.rope import RopeByLength
from workers.engines.sampling import sample
from workers.engines.tokenizer import encode_prompt, load_tokenizer
from workers.gpu_memory import is_out_of_memory, part_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    Ids = NDArray[np.int64]

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
CPU_CACHE_BYTES = 2 << 30
SCORE_BYTES = 1 << 30
LEAST_CHUNK = 64
"""Where memory runs out, chunks are halved down to this."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at once: tokens a prefill pass, prompts decoded side by side, bytes of keys and values.

    `cache_bytes` None means half of what the weights leave of the worker's part of a GPU, or 2 GiB on a CPU.
    """

    chunk: int = 2048
    batch: int = 32
    cache_bytes: int | None = None


class TransformersEngine:
    """A resident model; implements `Engine`. Open it with `from_folder` or `from_state`."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, version: str, limits: Limits) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        half_products.speed_up(self.model)
        self.tokenizer = tokenizer
        self.config: PreTrainedConfig = model.config.get_text_config(decoder=True)
        self.limits = limits
        self._version: str | None = version
        self._resident: tuple[Ids, KeyValueBuffer, int] | None = None
        self._rope = RopeByLength(model, self.config.model_type)
        self._end_tokens = _end_tokens(model, tokenizer)
        self._memory = CPU_CACHE_BYTES
        if self.device.type != "cpu":
            weights = sum(place.nbytes for place in self.model.parameters())
            self._memory = max(0, part_of(str(self.device)) - weights) // 2
        self._ours = model.config._attn_implementation == attention.NAME
        self._cache_dtype: torch.dtype = attention.cache_dtype(model.device, model.dtype) if self._ours else model.dtype

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        version: str = "",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        limits: Limits | None = None,
    ) -> TransformersEngine:
        """The checkpoint in a local folder, safetensors only; `dtype` None keeps the checkpoint's own.

        On a CPU with bf16 units the checkpoint's bf16 is the faster choice (1.9 × float32 in prefill, measured on the
        tiny example parents); on one without them float32 is a little faster (see `half_products`), in twice the
        memory.
        """
        if not (Path(folder) / "config.json").is_file():
            raise BadInput(f"{folder}: no config.json; give a folder that holds a checkpoint")
        config = _load_config(AutoConfig.from_pretrained, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=_attention_for(config),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        return cls(model.to(_device(device)), load_tokenizer(folder), version or str(folder), limits or Limits())

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | str | Path,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        version: str = "",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        limits: Limits | None = None,
        end_tokens: Collection[int] = (),
    ) -> TransformersEngine:
        """A model from the content of config.json and a stream of named tensors; nothing is written or fetched.

        `end_tokens` end an answer beside those of the config and the tokenizer, as a generation_config.json has them.
        """
        settings = {key: value for key, value in config.items() if key != "auto_map"}
        if "model_type" not in settings:
            raise BadInput("config.json: no model_type; the architecture is not known without it")
        built = _load_config(AutoConfig.for_model, **settings)
        with no_init_weights(), torch.device(_device(device)):
            model = AutoModelForCausalLM.from_config(
                built,
                dtype=dtype or built.dtype or torch.bfloat16,
                attn_implementation=_attention_for(built),
                trust_remote_code=False,
            )
        model.tie_weights()
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        engine = cls(model, tokenizer, version, limits or Limits())
        engine._end_tokens |= frozenset(end_tokens)
        engine.swap(tensors, version)
        return engine

    @property
    def version(self) -> str:
        """The name of the resident weights; refused between a swap that failed and one that succeeds."""
        if self._version is None:
            raise MergeyardError("the engine holds a mixture of two models: its last swap failed; swap again")
        return self._version

    @property
    def max_length(self) -> int:
        """The context that the config states, stretched by its RoPE; prompt and answer together."""
        stated = int(self.config.max_position_embeddings)
        return stretched(stated, rope(self.config.to_dict())[1], self.config.model_type)

    @property
    def max_scored(self) -> int:
        """As many as it holds."""
        return longest_scored("transformers", self.max_length)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    def encode(self, text: str, *, bare: bool = False) -> list[int]:
        """Token ids of `text` as a prompt."""
        return encode_prompt(self.tokenizer, text, bare=bare)

    @property
    def places(self) -> Mapping[str, Tensor]:
        """Every parameter, by all its names, and the buffers that a checkpoint holds."""
        return {**dict(self.model.named_parameters(remove_duplicate=False)), **self._saved_buffers()}

    def close(self) -> None:
        """Drop the model and its caches, and give a GPU's memory back."""
        self._resident = None
        device, self.model = self.device, None
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()

    def swap(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Copy every weight into the resident model by name, one at a time, cast to the resident dtype.

        Tied weights may come under either name or both. `BadInput` for a name the model has not, a name that never
        came and a shape that differs; after it the engine answers nothing until a swap succeeds.
        """
        self._resident = None
        self._version = None
        places = self.places
        filled: dict[Tensor, str] = {}
        with torch.inference_mode():
            for name, tensor in weights:
                _fill(places, filled, name, tensor)
        missing = sorted(name for name, place in places.items() if place not in filled)
        if missing:
            raise BadInput(
                f"{version}: {len(missing)} weights never came, the first is {missing[0]}; merge all of them"
            )
        self._version = version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One answer a prompt, in order; `seconds` is the time of its pool over the pool's prompts."""
        _ = self.version
        ids = [np.asarray(self.encode(prompt.whole, bare=prompt.bare), dtype=np.int64) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids, strict=True):
            check_room(len(tokens), prompt.longest, self.max_length)
        answers: dict[int, Answer] = {}
        stretches = [
            self._rope.stretch(len(tokens) + prompt.longest) for prompt, tokens in zip(prompts, ids, strict=True)
        ]
        for stretch in sorted(set(stretches), reverse=True):
            alike = [index for index, own in enumerate(stretches) if own == stretch]
            self._rope.use(stretch)
            found = self._generate([prompts[index] for index in alike], [ids[index] for index in alike], progress)
            answers.update({alike[at]: answer for at, answer in found.items()})
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of tokens 1 … n-1 of each window given those before; logits live for one chunk only."""
        _ = self.version
        scores: list[NDArray[np.float32]] = []
        for window in windows:
            check_window(len(window), self.max_scored)
            self._rope.use(self._rope.stretch(len(window)))
            scores.append(self._in_chunks(self._scored_alone, np.asarray(window, dtype=np.int64)))
            if progress:
                progress(1)
        return scores

    @torch.inference_mode()
    def loglikelihoods(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding says the same.

        The keys and values of the last text stay: a second continuation of one context pays for itself alone.
        """
        _ = self.version
        for ids, _ in texts:
            check_window(len(ids), self.max_scored)
        return [self._in_chunks(self._continued, np.asarray(ids, dtype=np.int64), kept) for ids, kept in texts]

    def _scored_alone(self, chunk: int, ids: Ids) -> NDArray[np.float32]:
        return self._score_from(self._buffer(1, len(ids)), ids, 0, chunk)[0]

    def _continued(self, chunk: int, ids: Ids, kept: int) -> tuple[float, bool]:
        """One of `loglikelihoods`; its cached keys and values serve the next one."""
        stretch = self._rope.stretch(len(ids))
        known, cache, known_stretch = self._resident or (ids[:0], self._buffer(1, 0), stretch)
        self._resident = None
        shared = min(common_prefix(known, ids), kept - 1) if known_stretch == stretch else 0
        if cache.columns < len(ids):
            shared, cache = 0, self._buffer(1, min(self.max_length, 2 * len(ids)))
        self._rope.use(stretch)
        self._prefill(cache, 0, ids[: kept - 1], shared, chunk)
        scores, greedy = self._score_from(cache, ids, kept - 1, chunk)
        self._resident = (ids[:-1], cache, stretch)
        return float(scores.sum(dtype=np.float64)), greedy

    def _in_chunks(self, work: Callable[..., Any], ids: Ids, *more: Any) -> Any:
        """`work(chunk, ids, …)` with the chunks that were asked for, or smaller ones where memory runs out."""
        chunk = self.limits.chunk
        while True:
            try:
                return work(chunk, ids, *more)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room()  # outside the handler, whose traceback holds the tensors that did not fit
            if chunk <= LEAST_CHUNK:
                raise self._too_large(len(ids))
            chunk //= 2

    def _make_room(self) -> None:
        self._resident = None
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    def _too_large(self, tokens: int) -> MergeyardError:
        return MergeyardError(
            f"{tokens} tokens do not fit into the memory of {self.device}; "
            "evaluate shorter lengths, or on a device with more memory"
        )

    def _generate(self, prompts: Sequence[Prompt], ids: Sequence[Ids], progress: Progress | None) -> dict[int, Answer]:
        """Answers by prompt, of prompts that are read with the same rotary embeddings."""
        new_tokens = [prompt.longest for prompt in prompts]
        rows = make_rows(ids, [prompt.prefix for prompt in prompts], new_tokens, self.limits.batch)
        answers: dict[int, Answer] = {}
        most_cells = max(1, self._cache_bytes() // self._bytes_a_cell())
        for pool in pools(rows, max_branches=self.limits.batch, max_cells=most_cells):
            started = time.perf_counter()
            outputs = self._outputs(pool, prompts, progress)
            seconds = (time.perf_counter() - started) / len(outputs)
            for member, grown in outputs.items():
                parts = grown.tokens_in, grown.tokens, grown.thought
                answers[member] = answer_of(
                    grown.prompt, *parts, self._text, cut=grown.full, finite=grown.finite, seconds=seconds
                )
        return answers

    def _outputs(self, pool: Pool, prompts: Sequence[Prompt], progress: Progress | None) -> dict[int, Growing]:
        """What a pool says, by prompt; what does not fit into memory is asked again in fewer slots and smaller parts.

        Rows that have ended by then stay as they are.
        """
        outputs: dict[int, Growing] = {}
        chunk = self.limits.chunk
        while True:
            try:
                self._decode(pool, prompts, chunk, outputs, progress)
                return outputs
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room()  # outside the handler, whose traceback holds the tensors that did not fit
            pool = replace(pool, rows=tuple(row for row in pool.rows if not outputs.keys() >= {*row.members}))
            if less := smaller(pool):
                pool = less
            elif chunk > LEAST_CHUNK:
                chunk //= 2
            else:
                raise self._too_large(pool.columns)

    def _text(self, tokens: list[int], special: bool) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=not special))

    def _decode(
        self,
        pool: Pool,
        prompts: Sequence[Prompt],
        chunk: int,
        outputs: dict[int, Growing],
        progress: Progress | None,
    ) -> None:
        """Answer a pool's rows into `outputs`: each step one token for every branch that has not ended.

        The next row takes the place of one that has ended; where none is left the last row does, so that the rows of
        a step lie side by side.
        """
        cache = self._buffer(pool.slots, pool.columns)
        slots = Slots(pool, self.device)
        waiting = deque(pool.rows)
        growing: dict[int, Growing] = {}

        def place(slot: int) -> None:
            row = waiting.popleft()
            self._prefill_row(cache, slots, slot, row, chunk)
            for member, branch in zip(row.members, row.branches, strict=True):
                growing[member] = Growing(prompts[member], len(row.trunk) + len(branch))

        for slot in range(pool.slots):
            place(slot)
        while slots.rows:
            living = [
                (slot, branch, growing[member])
                for slot, row in enumerate(slots.rows)
                for branch, member in enumerate(row.members)
                if not growing[member].ended
            ]
            logits = self._step(cache, slots, [(slot, branch) for slot, branch, _ in living])
            tokens, finite = self._choose(logits, [output for _, _, output in living])
            for (slot, branch, output), token, is_finite in zip(living, tokens, finite, strict=True):
                output.take(token, is_finite, self._end_tokens, self._text)
                slots.tokens[slot, branch] = token
                slots.positions[slot, branch] += 1
            finished = 0
            for slot in reversed(range(len(slots.rows))):
                members = slots.rows[slot].members
                again: set[int] = set()
                if len(members) > 1 and not all(growing[member].finite for member in members):
                    # a NaN of one branch enters the sums of the others, masked or not: each gets a row of its own
                    again = {who for who in members if not (growing[who].ended and growing[who].finite)}
                    waiting.extend(slots.rows[slot].alone(again))
                elif not all(growing[member].ended for member in members):
                    continue
                finished += len(members) - len(again)
                outputs |= {member: growing.pop(member) for member in members if member not in again}
                if waiting:
                    place(slot)
                else:
                    last = len(slots.rows) - 1
                    cache.copy(last, slot, int(slots.filled[last]))
                    cache.clear(slot, int(slots.filled[last]), int(slots.filled[slot]))
                    slots.drop(slot)
            if progress and finished:
                progress(finished)

    def _step(self, cache: KeyValueBuffer, slots: Slots, living: list[tuple[int, int]]) -> Tensor:
        """Logits [living, vocabulary] after the next token of each living (slot, branch)."""
        cells = slots.advance(living)
        rows, width = len(slots.rows), max(len(row.branches) for row in slots.rows)
        end = int(slots.filled[:rows].max())
        positions = slots.positions[:rows, :width]
        near = min(self._near(len(slots.rows[slot].trunk), int(positions[slot, branch])) for slot, branch in living)
        mask = self._mask(slots.visible[:rows, :width, :end], positions, slots.places[:rows, :end], near)
        cache.scatter(rows, end, cells)
        logits = self._forward(cache, slots.tokens[:rows, :width], positions, mask, keep=width)
        return logits[cells[0], cells[1]]

    def _choose(self, logits: Tensor, outputs: Sequence[Growing]) -> tuple[list[int], list[bool]]:
        """The next token of each output, the likeliest or a sampled one, and whether its logits are numbers."""
        tokens = logits.argmax(-1)
        sampled = [(at, output.prompt.sampling, len(output.tokens)) for at, output in enumerate(outputs)]
        drawn = [(at, sampling, step) for at, sampling, step in sampled if sampling is not None]
        if drawn:
            rows, settings, steps = zip(*drawn, strict=True)
            tokens[list(rows)] = sample(logits[list(rows)], settings, steps)
        return tokens.tolist(), logits.isfinite().all(-1).tolist()

    def _prefill_row(self, cache: KeyValueBuffer, slots: Slots, slot: int, row: Row, chunk: int) -> None:
        """Fill a slot with a row: the start of its trunk from the row placed before, the rest of it, its branches."""
        before, trunk = slots.latest
        shared = common_prefix(trunk, row.trunk)
        cache.copy(before, slot, shared)
        cache.clear(slot, shared, int(slots.filled[slot]))
        self._prefill(cache, slot, row.trunk, shared, chunk)
        self._prefill_branches(cache, slot, row, chunk)
        slots.place(slot, row)

    def _prefill(self, cache: KeyValueBuffer, slot: int, ids: Ids, done: int, chunk: int) -> None:
        """Keys and values of `ids[done:]`, after those of `ids[:done]`, which lie in the slot."""
        for begin in range(done, len(ids), chunk):
            part = ids[None, begin : begin + chunk]
            cache.append(slot, begin)
            self._forward(cache, part, np.arange(begin, begin + part.shape[1])[None], None, keep=1)

    def _prefill_branches(self, cache: KeyValueBuffer, slot: int, row: Row, chunk: int) -> None:
        """Keys and values of all branches side by side, each blind to the others, less the last token of each."""
        lengths = [len(branch) - 1 for branch in row.branches]
        if not any(lengths):
            return
        trunk = len(row.trunk)
        ids = np.concatenate([branch[:-1] for branch in row.branches])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(trunk, trunk + length) for length in lengths])
        places = np.concatenate([np.arange(trunk), positions])
        for begin in range(0, len(ids), chunk):
            end = min(begin + chunk, len(ids))
            visible = np.ones((1, end - begin, trunk + end), bool)
            visible[0, :, trunk:] = (owner[begin:end, None] == owner[None, :end]) & (
                np.arange(begin, end)[:, None] >= np.arange(end)[None]
            )
            asked = positions[None, begin:end]
            mask = self._mask(
                torch.from_numpy(visible).to(self.device),
                asked,
                torch.from_numpy(places[None, : trunk + end]).to(self.device),
                self._near(trunk, int(asked.min())),
            )
            cache.append(slot, trunk + begin)
            self._forward(cache, ids[None, begin:end], asked, mask, keep=1)

    def _score_from(self, cache: KeyValueBuffer, ids: Ids, done: int, chunk: int) -> tuple[NDArray[np.float32], bool]:
        """Log-likelihoods of `ids[done + 1:]` after a cache of `ids[:done]`, and whether all are the likeliest."""
        step = max(1, min(chunk, SCORE_BYTES // (8 * self.config.vocab_size)))
        scores: list[Tensor] = []
        greedy = True
        for begin in range(done, len(ids) - 1, step):
            end = min(begin + step, len(ids) - 1)
            cache.append(0, begin)
            logits = self._forward(cache, ids[None, begin:end], np.arange(begin, end)[None], None, keep=end - begin)
            target = torch.from_numpy(ids[begin + 1 : end + 1]).to(self.device)
            chosen = logits[0].gather(1, target[:, None])[:, 0].float()
            scores.append((chosen - logits[0].float().logsumexp(-1)).cpu())
            greedy = greedy and bool((logits[0].argmax(-1) == target).all())
        return torch.cat(scores).numpy(), greedy

    def _forward(
        self, cache: KeyValueBuffer, ids: Ids, positions: Ids, mask: Tensor | dict[str, Tensor] | None, *, keep: int
    ) -> Tensor:
        """Logits [rows, keep, vocabulary] of the last `keep` of `ids` [rows, n], which are appended to the cache."""
        return self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    def _mask(self, visible: Tensor, positions: Ids, places: Tensor, near: int) -> Tensor | dict[str, Tensor]:
        """The attention mask for `visible` [rows, queries, columns]; a sliding window counts token positions.

        The mask of layers with a sliding window begins at column `near`.
        """
        full = hidden(visible, self._cache_dtype)[:, None]
        if self._window is None:
            return full
        distance = torch.from_numpy(positions).to(self.device)[:, :, None] - places[:, None, near:]
        sliding = hidden(visible[:, :, near:] & (distance < self._window), self._cache_dtype)[:, None]
        kinds: Sequence[str] = getattr(self.config, "layer_types", None) or ()
        return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding

    @property
    def _window(self) -> int | None:
        """The columns up to its own that a token sees in layers with a sliding window; None without such layers."""
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds: Sequence[str] = getattr(self.config, "layer_types", None) or ()
        return window if window and (not kinds or "sliding_attention" in kinds) else None

    def _near(self, trunk: int, position: int) -> int:
        """The first column in the sliding window of a token; in a branch, the columns are not in order."""
        return max(0, min(trunk, position + 1 - self._window)) if self._ours and self._window else 0

    def _buffer(self, rows: int, width: int) -> KeyValueBuffer:
        return KeyValueBuffer(self.config.num_hidden_layers, rows, width, self._cache_dtype)

    def _cache_bytes(self) -> int:
        return self._memory if self.limits.cache_bytes is None else self.limits.cache_bytes

    def _bytes_a_cell(self) -> int:
        """Bytes of keys and values that one token of one row takes over all layers."""
        config = self.config
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * size * self._cache_dtype.itemsize

    def _saved_buffers(self) -> dict[str, Tensor]:
        """Buffers that a checkpoint holds; others, such as the rotary frequencies, follow from the config."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}


def _fill(places: Mapping[str, Tensor], filled: dict[Tensor, str], name: str, tensor: Tensor) -> None:
    """Copy one incoming weight to its place; `filled` remembers by which name each place was filled."""
    place = places.get(name)
    if place is None:
        near = difflib.get_close_matches(name, places, n=1)
        raise BadInput(f"{name}: the model has no such weight" + (f"; did you mean {near[0]}?" if near else ""))
    if place.shape != tensor.shape:
        raise BadInput(f"{name}: shape {list(tensor.shape)} does not fit the model's {list(place.shape)}")
    twin = filled.setdefault(place, name)
    if twin == name:
        if place.data_ptr() != tensor.data_ptr():
            place.copy_(tensor)
    elif not torch.equal(place, tensor.to(place)):
        raise BadInput(f"{name}: differs from {twin}, to which config.json ties it; untie them or merge only one")


def _load_config(load: Callable[..., Any], *args: Any, **settings: Any) -> PreTrainedConfig:
    """The config; `BadInput` if it needs its own code or is not a decoder of attention layers."""
    try:
        config = load(*args, **settings)
    except (ValueError, KeyError) as error:
        raise BadInput(f"config.json: transformers cannot read it without foreign code: {error}") from error
    text = config.get_text_config(decoder=True)
    foreign = set(getattr(text, "layer_types", None) or ()) - ATTENTION_KINDS
    if foreign or config.is_encoder_decoder:
        what = ", ".join(sorted(foreign)) or "an encoder"
        raise BadInput(f"config.json: {config.model_type} has {what}; this engine serves decoders of attention layers")
    if getattr(text, "max_position_embeddings", None) is None:
        raise BadInput("config.json: no max_position_embeddings; the context length is not known without it")
    return config


def _attention_for(config: PreTrainedConfig) -> str:
    """Our windowed attention where the architecture takes sdpa and others', else the architecture's own plain one."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        architecture = mapping[type(config)]
    except KeyError as error:
        raise BadInput(f"config.json: {config.model_type} is not a causal language model; merge one that is") from error
    takes_ours = architecture._supports_sdpa and architecture._supports_attention_backend
    return attention.register() if takes_ours else "eager"


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: the model's own list, its config's and the tokenizer's."""
    settings = (getattr(model, "generation_config", None), model.config, tokenizer)
    found: set[int] = set()
    for value in (getattr(setting, "eos_token_id", None) for setting in settings):
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(found)
