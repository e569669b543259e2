"""The files of a point beside its weights and its config: whose they are, and which chat template holds."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.recipe import Recipe
from workers.checkpoints.chat_templates import NAMED, check_template, template_of
from workers.checkpoints.opening import Checkpoint


def chat_template(recipe: Recipe, members: Sequence[Checkpoint], tokenizer_from: str) -> str | None:
    """The Jinja text that replaces the chat template of the tokenizer; None if the recipe asks for none.

    `auto` is the commonest template of the parents, blanks around it aside, as in mergekit. Among equally common ones
    it is that of the tokenizer's parent, else the first; it is None if no parent has a template.
    """
    asked = recipe.chat_template
    if asked is None or asked in NAMED:
        return NAMED.get(asked or "")
    place = recipe.place_of("chat_template")
    if asked != "auto":
        check_template(asked, place)
        return asked
    found = {member.name: text for member in members if (text := template_of(member)) is not None and text.strip()}
    texts = [text.strip() for text in found.values()]
    best = max(found, key=lambda name: (texts.count(found[name].strip()), name == tokenizer_from), default=None)
    if best is None:
        return None
    check_template(found[best], f"{place}: parent {best}", "name a template in place of `auto`")
    return found[best]
