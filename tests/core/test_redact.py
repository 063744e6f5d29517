"""Secrets in text are masked, and nothing else is."""

import pytest

from carft_fast.core.redact import redact

PLANTED = "hf_PlantedSecret0123456789abcdefghij"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pa55@host:8000/x failed", "GET https://***@host:8000/x failed"),
        ("https://host/x?token=abc&n=3#part", "https://host/x?token=***&n=3#part"),
        ("https://host/x?n=3&api_key=abc", "https://host/x?n=3&api_key=***"),
        (f"401 for {PLANTED}.", "401 for ***."),
        ("headers {'Authorization': 'Bearer abc.def'}", "headers {'Authorization': 'Bearer ***'}"),
        ("authorization: basic bWU6cGE=", "authorization: basic ***"),
        ("sent Bearer abc.def", "sent Bearer ***"),
        ("key sk-proj-0123456789abcdefghij", "key ***"),
        ("--set wandb.api_key=abc", "--set wandb.api_key=***"),
        ('password = "abc"', 'password = "***"'),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "rl.micro_batch_tokens=200 rl.max_new_tokens=24",
        "carft-fast rl --set model.path=HuggingFaceTB/SmolLM2-135M-Instruct",
        "http://127.0.0.1:8000/v1/models?key",
        "the server at http://gpu2:8000 wants the token it was started with",
        "runs/sk-learn-models-with-long-names/data/key=5",
        "set model.trust_remote_code = true",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_token_of_the_environment_is_masked_whatever_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARFT_SERVER_TOKEN", "correct-horse-battery")
    assert redact("got 'correct-horse-battery'") == "got '***'"
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redact("a text") == "a text"
