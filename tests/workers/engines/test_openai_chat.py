"""The engine that asks a server in chats, of a server that is told each of its replies."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.errors import BadInput
from tests.model_server import serving
from workers.engines.engine import Answer, Message, Sampling, Thought
from workers.engines.openai_engine import _refused_setting


@pytest.fixture
def server():
    """Its model answers all prompts alike."""
    answer = Answer(" 4815162.", 200, 6, 0.0, True)
    with serving(SimpleNamespace(max_length=4096, generate=lambda prompts: [answer] * len(prompts))) as server:
        yield server


@pytest.fixture
def chat(opened):
    return opened(api="chat", concurrency=1, attempts=4)


@pytest.fixture
def served(opened):
    return opened(concurrency=1, attempts=4)


THINKING = Thought("</think>", budget=40, opened=False)


def asked_in_chat(prompt, **more):
    question, _, prefix = prompt.text.rpartition("? ")
    messages = (Message("user", f"{question}? "), Message("assistant", prefix))
    return replace(prompt, messages=messages, **more)


def completion(text):
    return json.dumps({"choices": [{"text": text, "finish_reason": "stop"}]}).encode()


def message(content, finish_reason="stop", usage=None, **more):
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], **({} if usage is None else {"usage": usage})}).encode()


def test_a_chat_is_asked_in_messages_with_the_arguments_of_its_template(chat, server, needle_prompt):
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 5), template=(("enable_thinking", False),))
    [answer] = chat.generate([prompt])
    assert (answer.text, answer.status) == (" 4815162.", "answered")
    body, _ = server.asked[-1]
    assert body["messages"] == [{"role": one.role, "content": one.content} for one in prompt.messages]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "prompt" not in body
    assert (body["temperature"], body["max_tokens"]) == (0, 12) and not {"seed", "top_p", "top_k"} & body.keys()
    chat.generate([replace(prompt, messages=prompt.messages[:1], template=())])
    assert not {"continue_final_message", "add_generation_prompt", "chat_template_kwargs"} & server.asked[-1][0].keys()


def test_samples_are_asked_with_their_seed(chat, served, server, needle_prompt):
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 2))
    for engine in (chat, served):
        engine.generate([replace(prompt, sampling=Sampling(0.6, 0.95, 20, (1 << 63) + 7))])
        asked = server.asked[-1][0]
        assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["seed"]) == (0.6, 0.95, 20, 7)
    served.generate([replace(prompt, sampling=Sampling(0.6, 0.95, 0, 7))])
    assert "top_k" not in server.asked[-1][0], "0 is all"


def test_a_prompt_without_messages_is_not_asked_in_a_chat(chat, server, needle_prompt):
    with pytest.raises(BadInput, match=r"asked in messages \(`api: chat`\); set `chat: true` in the benchmark"):
        chat.generate([needle_prompt("quiet-river", 4815162, 2)])
    with pytest.raises(BadInput, match="which scores no text; take the option `api: chat` out"):
        chat.score([[1, 2, 3]])
    assert server.asked == []


IS_IT = {"type": "text", "text": "is it 1?"}
THOUGHTS = [
    # reply, prompt's thinking, (status, text, thought)
    (message("<think>is it 1?</think> 7"), THINKING, ("answered", " 7", "is it 1?")),
    (message("is it 1?</think> 7"), THINKING, ("answered", " 7", "is it 1?")),
    (message("<think>is it 1? 7", "length"), THINKING, ("unended", "", "is it 1? 7")),
    (message("is it 1? 7", "stop"), THINKING, ("unended", "", "is it 1? 7")),
    (message(" 7", reasoning_content="is it 1?"), THINKING, ("answered", " 7", "is it 1?")),
    (message(" 7", reasoning="is it 1?"), THINKING, ("answered", " 7", "is it 1?")),
    (message("", "length", reasoning_content="is it 1?"), THINKING, ("unended", "", "is it 1?")),
    (message(None, "length", reasoning_content="is it 1?"), THINKING, ("unended", "", "is it 1?")),
    (message(None, "stop", reasoning_content="is it 1?"), THINKING, ("empty", "", "is it 1?")),
    (message(" 7", "length", reasoning_content="is it 1?"), THINKING, ("cut", " 7", "is it 1?")),
    (
        message(" 7", usage={"completion_tokens_details": {"reasoning_tokens": 5}}),
        THINKING,
        ("answered", " 7", ""),
    ),
    (
        message(" 7", usage={"completion_tokens_details": {"reasoning_tokens": 41}}),
        THINKING,
        ("unended", "", ""),
    ),
    (
        message([{"type": "thinking", "thinking": [IS_IT]}, {"type": "text", "text": "7"}]),
        THINKING,
        ("answered", "7", "is it 1?"),
    ),
    (message("<think>" + "is it 1? " * 40 + "</think> 7"), THINKING, ("unended", "", ("is it 1? " * 40).strip())),
    (message("</think> " + "7 " * 30, "stop"), THINKING, ("cut", None, "")),
    (message("is it 1?</think> 7"), None, ("answered", " 7", "is it 1?")),
    (message(" 7", reasoning_content="is it 1?"), None, ("answered", " 7", "is it 1?")),
    (message("7", "content_filter"), THINKING, ("filtered", "", "7")),
    (message("", "content_filter"), None, ("filtered", "", "")),
    (message(None, "stop", refusal="I cannot help with that."), None, ("filtered", "", "")),
    (message(None, "tool_calls", tool_calls=[{"id": "x"}]), None, ("empty", "", "")),
    (message("7", None), None, ("answered", "7", "")),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "thinking", "expected"), THOUGHTS)
def test_an_answer_is_what_follows_the_thought(chat, server, needle_prompt, reply, thinking, expected):
    server.failures = [reply]
    [answer] = chat.generate([asked_in_chat(needle_prompt("quiet-river", 4815162, 2), thinking=thinking)])
    status, text, thought = expected
    assert (answer.status, answer.thought) == (status, thought)
    if text is None:
        assert len(chat.encode(answer.text, bare=True)) == 12, "as many tokens as the benchmark gives an answer"
    else:
        assert answer.text == text
    assert (answer.tokens_thought > 0) is (thought != "" or b"reasoning_tokens" in reply or b"</think>" in reply)


def test_a_text_without_an_end_tag_is_an_answer_only_where_the_server_sets_thoughts_apart(chat, server, needle_prompt):
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 2), thinking=THINKING)
    plain, cut, opened = message(" 7"), message("is it 7", "length"), message("<think>is it 7")
    server.failures = [plain, cut, opened, message(" 7", reasoning_content="is it 1?")]
    answers = chat.generate([prompt] * 4)
    assert [answer.status for answer in answers] == ["answered", "unended", "unended", "answered"]
    server.failures = [plain, cut, opened]
    assert {answer.status for answer in chat.generate([prompt] * 3)} == {"unended"}


def test_a_thought_of_a_completion_is_split_and_never_stopped(served, server, needle_prompt):
    prompt = replace(needle_prompt("quiet-river", 4815162, 2), thinking=replace(THINKING, opened=True), stops=("?",))
    server.failures = [completion("is it 1?</think> 7? no")]
    [answer] = served.generate([prompt])
    assert (answer.status, answer.text, answer.thought) == ("answered", " 7", "is it 1?")
    asked = server.asked[-1][0]
    assert asked["max_tokens"] == prompt.longest == 52 and not {"stop", "skip_special_tokens"} & asked.keys()


def test_an_end_tag_that_is_a_special_token_is_asked_for_and_cleaned_up(served, server, needle_prompt):
    served.tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    prompt = replace(needle_prompt("quiet-river", 4815162, 2), thinking=THINKING)
    server.failures = [completion("is it 1?</think> 7<|endoftext|>")]
    [answer] = served.generate([prompt])
    assert answer.text == " 7" and server.asked[-1][0]["skip_special_tokens"] is False


REFUSED = {
    "max_tokens": {"max_completion_tokens": 12},
    "temperature": {},
    "seed": {},
    "stop": {},
    "continue_final_message": {},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "told",
    [
        {"error": {"message": "Unsupported parameter: '%s' is not supported with this model.", "param": "%s"}},
        {"error": {"message": "Unrecognized request argument supplied: %s"}},
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "%s"], "msg": "Extra inputs are not permitted"}]},
    ],
)
def test_a_server_that_takes_no_such_setting_is_asked_without_it(chat, server, needle_prompt, name, told):
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 2), stops=("\n",))
    if name == "seed":
        prompt = replace(prompt, sampling=Sampling(0.6, 0.95, 0, 7))
    server.failures = [(400, json.loads(json.dumps(told).replace("%s", name)))]
    first, _ = chat.generate([prompt, prompt])
    assert first.status == "answered" and len(server.asked) == 3, "the second one is asked right away"
    for body, _ in server.asked[1:]:
        assert name not in body and body.items() >= REFUSED[name].items()
    if name == "continue_final_message":
        assert [one["role"] for one in body["messages"]] == ["user"] and "add_generation_prompt" not in body
    changes = name in ("temperature", "seed", "continue_final_message")
    assert (f"takes no {name}: its " in first.remark) is changes


ALL_OF_SAMPLING = "temperature, top_p, top_k and samples"


@pytest.mark.parametrize(
    ("name", "value", "keys"),
    [("top_k", 20, "top_k"), ("top_p", 0.5, ALL_OF_SAMPLING), ("temperature", 0.6, ALL_OF_SAMPLING)],
)
def test_a_server_that_cannot_sample_as_asked_is_refused(chat, server, needle_prompt, name, value, keys):
    sampling = replace(Sampling(0.6, 0.95, 20, 7), **{name: value})
    server.failures = [(400, {"error": {"message": f"Unsupported value: '{name}' does not support {value}"}})]
    with pytest.raises(BadInput, match=rf"Unsupported value: '{name}' .*; take {keys} out of the job"):
        chat.generate([asked_in_chat(needle_prompt("quiet-river", 4815162, 2), sampling=sampling)])


def test_a_server_that_takes_no_argument_of_a_template_is_asked_without_or_in_texts(
    chat, served, server, needle_prompt
):
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 2), template=(("enable_thinking", False),))
    told = (400, {"error": {"message": "Unrecognized request argument supplied: chat_template_kwargs"}})
    server.failures = [told]
    with pytest.raises(
        BadInput, match=r"; write `chat: true` without arguments and take `thinking:` out .*"
    ) as refused:
        chat.generate([prompt])
    assert str(refused.value).endswith(", or give the engine's option `api: completions`")
    for engine, followed in ((chat, replace(prompt, template=())), (served, prompt)):
        assert engine.generate([followed])[0].status == "answered"
        assert "chat_template_kwargs" not in server.asked[-1][0]


def test_a_server_that_takes_no_argument_of_an_unfinished_message_is_asked_without_one(chat, server, needle_prompt):
    told = {"error": {"message": "add_generation_prompt: Extra inputs are not permitted"}}
    server.failures = [(400, told)]
    [answer] = chat.generate([asked_in_chat(needle_prompt("quiet-river", 4815162, 2))])
    assert answer.status == "answered" and "takes no continue_final_message: its " in answer.remark
    assert not {"continue_final_message", "add_generation_prompt"} & server.asked[-1][0].keys()


def test_a_refused_setting_without_a_remedy_of_its_own_ends_in_that_of_every_refusal(chat, server, needle_prompt):
    told = [
        (400, {"error": {"message": f"Unsupported parameter: '{n}'"}}) for n in ("max_tokens", "max_completion_tokens")
    ]
    server.failures = told
    with pytest.raises(BadInput, match=r"'max_completion_tokens'\"; check the URL and the model's name long, or give"):
        chat.generate([asked_in_chat(needle_prompt("quiet-river", 4815162, 2))])


@pytest.mark.parametrize(
    "said",
    [
        "'max_tokens' is too large: 12. This model's maximum context length is 8 tokens",
        "max_tokens is too large: 5000. This model does not support more than 4096 completion tokens",
        "'temperature': values of more than 2 are not supported",
        "This prompt is not allowed: we stop requests that violate our policy",
        "Unknown error: the seed of this conversation is not accepted",
    ],
)
def test_a_refusal_that_names_a_setting_for_another_reason_is_a_refusal(chat, server, needle_prompt, said):
    server.failures = [(400, {"error": {"message": said}})]
    prompt = asked_in_chat(needle_prompt("quiet-river", 4815162, 2), stops=("\n",), sampling=Sampling(0.6, 0.95, 20, 7))
    with pytest.raises(BadInput) as refused:
        chat.generate([prompt])
    assert said in str(refused.value) and "; check the URL and the model's name long, or give" in str(refused.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"stop is not supported",
        b"Extra inputs are not permitted, field: 'stop'",
        b'{"error": {"message": "`stop` parameter is unsupported"}}',
        b'{"error": {"message": "stop: Extra inputs are not permitted"}}',
        b'{"error": {"message": "Argument not supported on this model: stop"}}',
        b'{"error": {"message": "Unknown name \\"stop\\": Cannot find field."}}',
        b'{"error": {"message": "extraneous key [stop] is not permitted"}}',
        b'{"error": {"message": "Not supported.", "param": "stop"}}',
    ],
)
def test_servers_name_a_setting_that_they_refuse_in_many_ways(reply):
    assert _refused_setting(reply, {"model": "long", "messages": [], "stop": ["a"], "seed": 7}) == "stop"


NO_CHAT_COMPLETION = [
    b"<html><title>Bad gateway</title></html>", b'{"choices": [{"message": {"content": "7', b'{"choices": []}',
    b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": null}, "finish_reason": null}]}',
    b'{"choices": [{"message": {"content": 7}}]}', b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    b'{"choices": [{"message": {"content": "7", "reasoning_content": "\\ud800"}}]}',
    b'{"choices": [{"message": {"content": "7"}, "finish_reason": "error"}]}',
    b'{"error": {"message": "overloaded", "code": 529}}',
]  # fmt: skip


@pytest.mark.parametrize("reply", NO_CHAT_COMPLETION)
def test_a_reply_that_is_no_chat_completion_is_asked_for_again(chat, server, needle_prompt, reply):
    server.failures = [reply] * 3
    [answer] = chat.generate([asked_in_chat(needle_prompt("quiet-river", 4815162, 2))])
    assert answer.text == " 4815162." and len(server.asked) == 4
