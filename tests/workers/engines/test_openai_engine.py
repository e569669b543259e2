"""The engine that asks a server.

The server of these tests is stdlib around the real tiny model; it answers as OpenAI's API does and can be told to fail.
The same engine meets real servers in `test_real_servers.py`, and chats in `test_openai_chat.py`.
"""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from jobs.errors import AccessDenied, BadInput, Unavailable
from tests.certificates import encrypt
from tests.model_server import serving
from workers.engines.engine import Prompt
from workers.engines.openai_engine import OpenAIEngine


@pytest.fixture
def server(engine):
    with serving(engine) as server:
        yield server


@pytest.fixture
def served(opened):
    return opened(concurrency=3, attempts=4)


def test_answers_are_those_of_the_model_behind_the_server(served, engine, needle_prompt):
    prompts = [needle_prompt("quiet-river", 4815162 + lines, lines) for lines in range(2, 8)]
    counts = []
    answers = served.generate(prompts, progress=counts.append)
    expected = engine.generate(prompts)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [answer.tokens_in for answer in answers] == [answer.tokens_in for answer in expected]
    assert counts == [1] * 6 and served.version == "long" and served.max_length == 4096


def test_requests_are_greedy_and_bring_the_key(served, server, needle_prompt, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"HTTP://127.0.0.1:{server.server_port}/v1/")
    served.generate([needle_prompt("quiet-river", 4815162, 2)])
    body, authorization = server.asked[-1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("long", 0, 12)
    assert authorization == "Bearer s3cret"


def test_stops_go_with_the_request_four_at_most_and_are_cut_here_too(served, server, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 2)
    stops = ("\n", "?", "!", "\n\n", "516")
    assert served.generate([replace(prompt, stops=stops)])[0].text == " 481"
    assert server.asked[-1][0]["stop"] == ["\n", "?", "!", "\n\n"]
    served.generate([prompt])
    assert "stop" not in server.asked[-1][0]


def test_busy_and_broken_servers_are_asked_again(served, server, needle_prompt):
    server.failures = [429, 503, "reset"]
    assert served.generate([needle_prompt("quiet-river", 4815162, 2)])[0].text == " 4815162."
    assert len(server.asked) == 4


def test_a_server_that_keeps_failing_is_given_up_by_name(served, server, needle_prompt):
    server.failures = [500] * 4
    with pytest.raises(Unavailable, match=r"/v1/completions failed 4 times, at last with status 500"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


@pytest.mark.parametrize(
    ("status", "error"), [(401, AccessDenied), (403, AccessDenied), (404, BadInput), (400, BadInput), (501, BadInput)]
)
def test_a_refusal_is_not_repeated(served, server, needle_prompt, status, error):
    server.failures = [status]
    with pytest.raises(error, match="told to fail"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])
    assert len(server.asked) == 1


NO_COMPLETION = [
    b"<html><title>welcome</title></html>", b"[1]", b"null", b"{}", b'{"choices": []}', b'{"choices": [7]}',
    b'{"choices": [{"te', b'{"choices": {"text": ""}}', b'{"choices": [{"text": null}]}', b"[" * 100_000,
    b'{"choices": [{"text": "\\ud800"}]}', b'{"choices": [{"text": "' + b"a" * (2 << 20) + b'"}]}',
    b'{"error": {"message": "provider failed", "code": 502}}',
    b'{"choices": [{"text": "", "finish_reason": "error"}]}',
]  # fmt: skip


@pytest.mark.parametrize("reply", NO_COMPLETION)
def test_a_reply_that_is_no_completion_is_asked_for_again(served, server, needle_prompt, reply):
    server.failures = [reply] * 3
    assert served.generate([needle_prompt("quiet-river", 4815162, 2)])[0].text == " 4815162."
    server.failures = [reply] * 4
    with pytest.raises(Unavailable, match=r"failed 4 times, at last with the answer .*; run again") as caught:
        served.generate([needle_prompt("quiet-river", 4815162, 2)])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_moved_server_is_named_with_its_new_place(served, server, needle_prompt):
    server.failures = [(307, b"", None, "https://elsewhere.example/v1/completions")]
    with pytest.raises(BadInput, match=r'status 307: "", moved to "https://elsewhere\.example/v1/completions"; check'):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_a_web_page_in_place_of_answers_asks_for_the_url(served, server, needle_prompt):
    server.failures = [b"<html><title>Chat</title></html>"] * 4
    with pytest.raises(Unavailable, match=r'the answer "Chat", which is not a completion \(is the URL right\?\); run'):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_a_chat_completion_is_named_at_once(served, server, needle_prompt):
    server.failures = [b'{"choices": [{"message": {"content": "x"}}]}']
    with pytest.raises(BadInput, match="answers with a chat completion; give the engine's option `api: chat`"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_an_error_of_status_200_counts_as_the_status_in_it(served, server, needle_prompt):
    server.failures = [b'{"error": {"message": "no credit", "code": 403}}']
    with pytest.raises(AccessDenied, match='is an error: "no credit"'):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_a_server_is_given_the_pause_that_it_asks_for(served, server, needle_prompt):
    server.failures = [(429, {}, "1")]
    begun = time.monotonic()
    assert served.generate([needle_prompt("quiet-river", 4815162, 2)])[0].text == " 4815162."
    assert time.monotonic() - begun > 1
    server.asked.clear()
    server.failures = [(503, {"error": {"message": "model is loading"}}, "3600")]
    told = 'failed 1 times, at last with status 503: "model is loading", and asks to wait 3600 s; run again'
    with pytest.raises(Unavailable, match=told):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_the_words_of_a_server_cannot_move_the_cursor_nor_repeat_the_key(served, server, needle_prompt, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_BASE_URL", served.url)
    server.failures = [(401, b"\x1b[2J\nwrong key s3cret", None)]
    with pytest.raises(AccessDenied) as caught:
        served.generate([needle_prompt("quiet-river", 4815162, 2)])
    assert 'status 401: "\\u001b[2J wrong key …"; is the key in OPENAI_API_KEY right?' in str(caught.value)


@pytest.mark.parametrize("read", [10**23, -5, 0, True, 5000, "7", None])
def test_a_count_that_cannot_be_is_ours(served, server, needle_prompt, read):
    prompt = needle_prompt("quiet-river", 4815162, 2)
    usage = {"prompt_tokens": read, "completion_tokens": read}
    server.failures = [json.dumps({"choices": [{"text": "7"}], "usage": usage}).encode()]
    (answer,) = served.generate([prompt])
    assert (answer.tokens_in, answer.tokens_out) == (len(served.encode(prompt.whole)), len(served.encode("7")))


def test_an_untrusted_certificate_is_refused_at_once_and_the_remedy_works(
    server, parents, needle_prompt, tmp_path, monkeypatch
):
    certificate = encrypt(server, tmp_path)
    url = f"https://127.0.0.1:{server.server_port}/v1"
    prompt = needle_prompt("quiet-river", 4815162, 2)
    served = OpenAIEngine(url, "long", parents / "long", max_length=4096)
    with pytest.raises(BadInput, match=r"not trusted \(self.signed certificate\); .* SSL_CERT_FILE"):
        served.generate([prompt])
    served.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    served = OpenAIEngine(url, "long", parents / "long", max_length=4096)
    assert served.generate([prompt])[0].text == " 4815162."
    served.close()


def test_a_server_without_a_length_takes_the_length_that_will_be_asked(server, parents):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(BadInput, match="does not say how long a prompt other takes; give the engine's option"):
        OpenAIEngine(url, "other", parents / "long")
    for name, options, length in [("other", {"asked_length": 99}, 99), ("other", {"max_length": 77}, 77)]:
        served = OpenAIEngine(url, name, parents / "long", **options)
        assert served.max_length == length
        served.close()


@pytest.mark.parametrize(
    ("adds", "bare", "text", "sent"),
    [
        ("$A", False, "The sky", "The sky"),
        ("$A", True, "<|endoftext|>The sky", "<|endoftext|>The sky"),
        ("<|endoftext|> $A", False, "The sky", "The sky"),
        ("<|endoftext|> $A", True, "<|endoftext|>The sky", "The sky"),
        ("<|endoftext|> $A", True, "The sky", "ids"),
        ("$A <|endoftext|>", False, "The sky", "ids"),
        ("<|endoftext|> $A <|endoftext|>", True, "<|endoftext|>The sky", "ids"),
    ],
)
def test_a_server_that_adds_the_special_tokens_reads_the_prompt_of_the_other_engines(
    served, server, adds, bare, text, sent
):
    mark = ("<|endoftext|>", served.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    served.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=[mark])
    served.tokenizer.bos_token = "<|endoftext|>"
    server.failures = [completion(" blue", "stop")]
    served.generate([Prompt("", text, 4, bare=bare)])
    prompt = server.asked[-1][0]["prompt"]
    assert prompt == (served.encode(text, bare=bare) if sent == "ids" else sent)
    read = prompt if sent == "ids" else served.tokenizer(prompt)["input_ids"]
    assert read == served.encode(text, bare=bare)


def completion(text, finish_reason=None, **more):
    return json.dumps({"choices": [{"text": text, "finish_reason": finish_reason, **more}]}).encode()


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (completion(" 4815162.", "stop"), "answered", " 4815162."),
        (completion(" 4815162."), "answered", " 4815162."),
        (completion(" ", "stop"), "empty", " "),
        (completion(" 48", "length"), "cut", " 48"),
        (completion(None, "length"), "cut", ""),
        (completion(None, "stop"), "empty", ""),
        (completion("", "content_filter"), "filtered", ""),
        (completion("", "length", reasoning_content="let me see"), "cut", ""),
        (completion(None, None, reasoning="let me see"), "empty", ""),
    ],
)
def test_an_answer_says_how_it_ended(served, server, needle_prompt, reply, status, text):
    server.failures = [reply]
    [answer] = served.generate([needle_prompt("quiet-river", 4815162, 2)])
    assert (answer.status, answer.text) == (status, text)
    assert ("gave reasoning in place of an answer" in answer.remark) == (b"let me see" in reply)


def test_a_stop_text_in_an_answer_that_reached_its_limit_ended_it(served, server, needle_prompt):
    server.failures = [completion(" 4815162. The grass", "length")]
    [answer] = served.generate([replace(needle_prompt("quiet-river", 4815162, 2), stops=(".",))])
    assert (answer.status, answer.text) == ("answered", " 4815162")


def test_a_refused_prompt_fails_alone_and_a_server_that_refuses_all_of_them_is_an_error(server, parents, needle_prompt):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    served = OpenAIEngine(url, "long", parents / "long", concurrency=1, attempts=4, first_pause_seconds=0.01)
    prompts = [needle_prompt("quiet-river", 4815162, lines) for lines in (2, 3)]
    server.failures = [400]
    refused, answered = served.generate(prompts)
    assert (refused.status, refused.text, refused.tokens_out) == ("failed", "", 0)
    assert "status 400" in refused.remark and "told to fail" in refused.remark
    assert (answered.status, answered.text) == ("answered", " 4815162.")
    server.failures = [400, 422]
    with pytest.raises(BadInput, match="status 400"):
        served.generate(prompts)
    server.failures = [404]
    with pytest.raises(BadInput, match="status 404"):
        served.generate(prompts)
    served.close()


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        7,
        {},
        {"token_logprobs": [None, -1.0, -1.0]},
        {"token_logprobs": [None] * 3, "top_logprobs": [None] * 3},
        {"token_logprobs": [None, -1.0, "x"], "top_logprobs": [None, {"a": -1.0}, {"a": -1.0}]},
        {"token_logprobs": [None, -1.0, -1.0], "top_logprobs": [None, {"a": -1.0}, {}]},
    ],
)
def test_an_echo_that_lacks_something_is_no_echo(served, server, logprobs):
    server.failures = [json.dumps({"choices": [{"text": "", "logprobs": logprobs}]}).encode()]
    with pytest.raises(BadInput, match="does not echo logprobs"):
        served.loglikelihoods([([1, 2, 3], 1)])


def test_a_server_that_read_less_than_it_was_sent_is_refused(served, server, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 20)
    sent = len(served.encode(prompt.whole))

    def reply(read):
        return json.dumps({"choices": [{"text": " 1"}], "usage": {"prompt_tokens": read}}).encode()

    server.failures = [reply(sent - 100), reply(sent - 1), reply(sent + 1), reply(None)]
    told = rf"read {sent - 100} of a prompt's {sent} tokens: it cuts long prompts.* or ask at shorter lengths"
    with pytest.raises(BadInput, match=told):
        served.generate([prompt])
    counted = [served.generate([prompt])[0].tokens_in for _ in range(3)]
    assert counted == [sent - 1, sent + 1, sent], "a special token more or less is none that was cut"


@pytest.mark.parametrize("failure", ["hang", "trickle"])
def test_an_answer_that_takes_too_long_is_not_asked_for_again(server, parents, needle_prompt, failure):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    served = OpenAIEngine(url, "long", parents / "long", timeout_seconds=2, first_pause_seconds=0.01)
    server.failures = [failure] * 6
    with pytest.raises(BadInput, match=r"gave no answer in 2 seconds; ask fewer at a time \(`concurrency`\)"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])
    served.close()
    assert len(server.asked) == 1
    patient = OpenAIEngine(url, "long", parents / "long", timeout_seconds=60, concurrency=1)
    server.failures.clear()
    assert patient.generate([needle_prompt("quiet-river", 4815162, 2)])[0].text == " 4815162."
    patient.close()


def test_a_server_that_keeps_failing_is_asked_for_no_longer_than_an_answer_may_take(server, parents, needle_prompt):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    served = OpenAIEngine(url, "long", parents / "long", timeout_seconds=3, first_pause_seconds=1.5, attempts=99)
    server.failures = [503] * 99
    with pytest.raises(Unavailable, match=r"failed \d times, at last with status 503"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])
    served.close()


def test_a_window_that_leaves_no_room_for_an_answer_never_leaves(served, server):
    assert served.max_scored == served.max_length - 1
    with pytest.raises(BadInput, match="a window of 4096 tokens cannot be scored; 2 to 4095 can"):
        served.score([[1] * 4096])
    assert server.asked == []


def test_scores_come_from_the_echo(served, engine, needle_prompt, loglikelihood):
    prompt = needle_prompt("quiet-river", 4815162, 4)
    ids = engine.encode(prompt.whole)
    np.testing.assert_allclose(served.score([ids])[0], engine.score([ids])[0], atol=1e-4)
    for continuation in (" 4815162.", " 4815163."):
        value, greedy = loglikelihood(served, prompt.whole, continuation)
        expected, expected_greedy = loglikelihood(engine, prompt.whole, continuation)
        assert value == pytest.approx(expected, abs=1e-3) and greedy is expected_greedy


@pytest.mark.parametrize("name", ["echo", "logprobs"])
def test_a_server_that_refuses_to_echo_names_those_that_can_score(served, server, name):
    server.failures = [(400, {"error": {"message": f"{name} is not supported"}})]
    with pytest.raises(BadInput, match=f"{name} is not supported.*; score this point with transformers or vllm$"):
        served.score([[5, 6, 7]])


def test_a_server_without_echo_cannot_score_and_is_told_so(served, server):
    server.echoes = False
    with pytest.raises(BadInput, match="does not echo logprobs"):
        served.score([[1, 2, 3]])


def test_a_prompt_that_does_not_fit_never_leaves(served, server, needle_prompt):
    with pytest.raises(BadInput, match="4096"):
        served.generate([needle_prompt("quiet-river", 4815162, 200)])
    assert server.asked == []


def test_a_served_model_keeps_its_weights(served):
    with pytest.raises(BadInput, match="serves long only"):
        served.swap([], "other")


def test_an_address_without_a_host_is_refused(parents):
    with pytest.raises(BadInput, match="http://host:port/v1"):
        OpenAIEngine("localhost:8000", "long", parents / "long")


def test_a_storm_of_refusals_for_the_rate_costs_no_answer(opened, server, needle_prompt, monkeypatch):
    monkeypatch.setattr("workers.engines.congestion.LONGEST_PAUSE_SECONDS", 0.05)
    patient = opened(concurrency=8, attempts=2)
    prompts = [needle_prompt("quiet-river", 4815162 + lines, lines) for lines in range(2, 12)]
    before = [answer.text for answer in patient.generate(prompts)]
    server.failures = [429, 529, (503, {}, "0"), *[429, 429, 529] * 6]
    assert [answer.text for answer in patient.generate(prompts)] == before
    assert len(server.asked) > 20, "more tries than `attempts` allows a failing server"


def test_a_server_that_answers_nobody_is_given_up_though_it_limits_the_rate(opened, server, needle_prompt):
    served = opened(timeout_seconds=1, first_pause_seconds=0.3)
    server.failures = [429] * 99
    with pytest.raises(Unavailable, match=r"failed \d times, at last with status 429"):
        served.generate([needle_prompt("quiet-river", 4815162, 2)])


def test_a_closed_engine_leaves_no_request_waiting(opened, server, needle_prompt):
    served = opened(concurrency=2)
    server.failures = [(429, {}, "500")] * 2

    def ask():
        with pytest.raises(Unavailable, match="the evaluation ended before its answer"):
            served.generate([needle_prompt("quiet-river", 4815162, 2)])
        ended.set()

    ended, asking = threading.Event(), threading.Thread(target=ask)
    asking.start()
    while not server.asked:
        time.sleep(0.01)
    began = time.monotonic()
    served.close()
    asking.join()
    assert ended.is_set() and time.monotonic() - began < 10
