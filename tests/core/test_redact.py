"""Secrets in text are masked, and nothing else is."""

import time

import pytest

from carft_fast.core.redact import masked, redact

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
        # passwords with the characters that end other parts of a URL
        ("GET https://me:p@ss/w0rd@host:8000/x failed", "GET https://***@host:8000/x failed"),
        ("postgresql://u:p:w#d@h:5/db redis://:pa55@h", "postgresql://***@h:5/db redis://***@h"),
        # signed URLs
        ("https://cdn/x?Signature=a~b-c&Key-Pair-Id=K1", "https://cdn/x?Signature=***&Key-Pair-Id=K1"),
        ("https://s3/x?X-Amz-Credential=a%2Fb&n=1", "https://s3/x?X-Amz-Credential=***&n=1"),
        ("https://blob/x?sv=1&sig=ab%2Bcd", "https://blob/x?sv=1&sig=***"),
        # headers
        ("Authorization: token abc", "Authorization: token ***"),
        ("Proxy-Authorization: Basic bWU6cGE=", "Proxy-Authorization: Basic ***"),
        ('Authorization: Digest username="me", response="abc"', "Authorization: Digest ***"),
        ("sent bearer abc.def", "sent bearer ***"),
        ("X-API-Key: abc", "X-API-Key: ***"),
        ("Cookie: session=abc; b=c", "Cookie: ***"),
        # options, assignments
        ("--token abc --n 3", "--token *** --n 3"),
        ("--hf_token='a b'", "--hf_token=***"),
        ("--api-key abc", "--api-key ***"),
        ("WANDB_API_KEY=cd18fc9fb6494384", "WANDB_API_KEY=***"),
        ("export OPENAI_KEY=abc12345", "export OPENAI_KEY=***"),
        ("AWS_SECRET_ACCESS_KEY=wJalr/K7MDENG+bP", "AWS_SECRET_ACCESS_KEY=***"),
        ("key=6KopZ9jZICffu4G7FgtJ", "key=***"),
        ("client_secret=abc,def", "client_secret=***"),
        ('password="a b, c"', 'password="***"'),
        (r"password='it\'s'", "password='***'"),
        ("pwd=hunter2; user=me", "pwd=***; user=me"),
        ("token='it was cut", "token='*** was cut"),
        # JSON, YAML
        ('{"token": "abc", "n": 3}', '{"token": "***", "n": 3}'),
        ("{'hf_token': 'a b', 'token': None}", "{'hf_token': '***', 'token': None}"),
        ("a: 1\n  password: hunter2\nb: 2", "a: 1\n  password: ***\nb: 2"),
        ("line 3: token: abc12345", "line 3: token: ***"),
        # what providers give out
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "***"),
        ("github_pat_0123456789abcdefghij_ABCDEFGHIJ", "***"),
        ("id AKIAIOSFODNN7EXAMPLE.", "id ***."),
        ("xoxb-123456789012-abcdef", "***"),
        ("AIza0123456789abcdefghij0123456789abcde", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_ghi", "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nafter", "***\nafter"),
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
        "step 12  loss=0.3412 kl=0.0021 tokens=2041 tokens/s=1532.1 lr=1e-05 seed=0",
        "key=value KEY=5 ORDER_KEY=2 group_key=question monkey=banana1234567",
        "the answer is 1234567890123456789012345678901234567890",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        '{"eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": null, "token": 17}',
        "eos_token: </s> pad_token = <pad> pad_token_id=0 token=<eos>",
        "wrong token: expected 5, got 7; the --token option is not known; password must not be blank",
        "--skip-tokenizer-init --max-num-batched-tokens 4096",
        "bearer token, the bearer of this letter; Authorization header is missing",
        "https://host:8000/models/name@main http://127.0.0.1:8000/v1?user=me@host git@github.com:org/repo.git",
        "def solution():\n    key = 5\n    secret_number = 12\n    return key",
        "AKIARA sk-SK hf_transfer torch==2.13.0+cpu 123e4567-e89b-12d3-a456-426614174000",
        "log-prob of the token: -0.35",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_token_of_the_environment_is_masked_whatever_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARFT_SERVER_TOKEN", "correct-horse-battery")
    assert redact("got 'correct-horse-battery'") == "got '***'"
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redact("a text") == "a text"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "MYSQL_PWD"])
def test_so_is_every_variable_that_is_called_like_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct horse/battery")
    assert redact("got 'correct horse/battery', in a URL correct%20horse%2Fbattery") == "got '***', in a URL ***"


def test_the_place_of_a_secret_and_the_working_folder_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("PWD", "a-working-folder")
    assert redact("/home/me/key.json in a-working-folder") == "/home/me/key.json in a-working-folder"


@pytest.mark.parametrize(
    "piece",
    ["a.", "token", "-", "://", "a:", "'token': ", "authorization:", '"\\', "key=", "a_key=a1", "--a", " ", "\n"],
)
def test_a_long_text_takes_no_longer_than_its_length_says(piece: str) -> None:
    """A model or a server can write anything into an error: ten times the text may take thirty times as long."""

    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        begin = time.process_time()
        masked(text)
        return time.process_time() - begin

    seconds(3_000)
    assert seconds(30_000) < 30 * max(seconds(3_000), 0.005)
