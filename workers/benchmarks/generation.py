"""The settings by which a benchmark's items are answered: in a chat or plainly, with or without a thought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jobs.errors import BadInput
from jobs.evaluate import BUDGET, AnsweringSpec, ThinkingSpec
from jobs.evaluation_tasks import PLAINLY, Generation
from workers.benchmarks.planned import located
from workers.benchmarks.texts.chat_template import (
    THOUGHT_ENDS,
    Thoughts,
    check_arguments,
    opening,
    switches,
    thought_end,
)
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Message, Sampling, Thought


def generation_of(
    spec: AnsweringSpec, tokenizer: Tokenizer, seed: int, *, worked_example: bool = False
) -> tuple[Tokenizer, Generation]:
    """The tokenizer of a benchmark's prompts, and the settings; `BadInput` where the chat template cannot be used.

    `seed` is the job's, for answers that are drawn. Where the job does not say whether a thought precedes the answer,
    the chat template does: one that shows a thought, does not close it by itself and waits for no argument to let the
    model think. With `worked_example` the settings have the text between two turns.
    """
    tokenizer, generation = _thoughts(spec, tokenizer, worked_example=worked_example)
    if not spec.temperature:
        return tokenizer, generation
    drawn = {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k, "samples": spec.samples}
    return tokenizer, replace(generation, seed=seed, **drawn)


def _thoughts(spec: AnsweringSpec, tokenizer: Tokenizer, *, worked_example: bool) -> tuple[Tokenizer, Generation]:
    """The settings without those of sampling."""
    thinking = spec.thinking
    if not spec.chat:
        if not isinstance(thinking, ThinkingSpec):
            return tokenizer, PLAINLY
        return tokenizer, Generation(end=thinking.end or THOUGHT_ENDS[0], budget=thinking.budget)
    with located(spec.place):
        template = tokenizer.template()
        told = dict(spec.chat) if isinstance(spec.chat, Mapping) else {}
        check_arguments(template, (*told, *(thinking.template if isinstance(thinking, ThinkingSpec) else ())))
        if thinking is not None:
            told = dict.fromkeys(switches(template), thinking is not False) | told
        end = thought_end(template)
        if isinstance(thinking, ThinkingSpec):
            told |= thinking.template
            end = thinking.end or end or THOUGHT_ENDS[0]
        system, arguments = spec.system or "", tuple(sorted(told.items()))
        frame = tokenizer.chat_frame(system=system, arguments=arguments, thoughts="open")
        shown = frame[1].rstrip()
        closes = bool(end) and shown.endswith(end)
        if isinstance(thinking, ThinkingSpec) and closes:
            raise BadInput(
                "the chat template ends the thought before the answer; give the argument that lets it think, as"
                " `thinking: {template: {enable_thinking: true}}`, or set `thinking: off`"
            )
        thinks = isinstance(thinking, ThinkingSpec)
        if thinking is None and end and not closes:
            lets = tuple(sorted((told | dict.fromkeys(switches(template), True)).items()))
            thinks = frame == tokenizer.chat_frame(system=system, arguments=lets, thoughts="open")
        if not thinks:
            thoughts: Thoughts = "closed" if thinking is None else "empty"
            frame = tokenizer.chat_frame(system=system, arguments=arguments, thoughts=thoughts)
        turns = tokenizer.turns(system=system, arguments=arguments) if worked_example else ("", "")
        return tokenizer.as_bare(), Generation(
            end=end if thinks else "",
            budget=0 if not thinks else thinking.budget if isinstance(thinking, ThinkingSpec) else BUDGET,
            opened=thinks and shown.endswith(opening(end)),
            found=thinks and thinking is None,
            frame=frame,
            turns=(turns[0] if thinks else frame[1], turns[1]),
            system=system,
            template=arguments,
        )


def earlier(tokenizer: Tokenizer, generation: Generation) -> Generation:
    """The settings of versions that closed every thought, where only the chat template shows one."""
    if not generation.found:
        return generation
    frame = tokenizer.chat_frame()
    return replace(PLAINLY, frame=frame, turns=(frame[1], generation.turns[1]))


def thought_of(generation: Generation) -> Thought | None:
    """The thought of a prompt; None where nothing is thought."""
    return Thought(generation.end, generation.budget, generation.opened) if generation.end else None


def sampling_of(generation: Generation, sample: int, *item: str | int) -> Sampling | None:
    """How a sample of an item is drawn, the same for all models; None for a greedy answer."""
    if not generation.temperature:
        return None
    seed = Draw("sample", generation.seed, sample, *item).below(1 << 31)  # servers take no larger one
    return Sampling(generation.temperature, generation.top_p, generation.top_k, seed)


def messages_of(text: str, answer_prefix: str, generation: Generation) -> tuple[Message, ...]:
    """The conversation whose rendering is `text`, its beginning of an answer included; none for a plain text."""
    before, after = generation.frame
    if not after:
        return ()
    to_answer, to_next = generation.turns
    body = text.removeprefix(before).removesuffix(after)
    *examples, question = body.split(to_next) if to_next else [body]
    found = [Message("system", generation.system)] if generation.system else []
    for example in examples:
        asked, _, answer = example.partition(to_answer)
        found += [Message("user", asked), Message("assistant", answer)]
    found.append(Message("user", question))
    return (*found, Message("assistant", answer_prefix)) if answer_prefix else tuple(found)
