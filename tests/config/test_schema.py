"""The settings themselves: documented to the last field, defaults from the paper, and what is refused."""

import pytest

from carft_fast.config.schema import Config
from carft_fast.config.toml import iter_fields, load_config
from carft_fast.core.errors import InputError
from carft_fast.core.redact import redact


def test_every_field_says_what_it_is() -> None:
    for key, field, _ in iter_fields(Config()):
        assert field.description, key
        assert len(field.description) > 15, key


def test_prompts_are_shared_where_there_are_several_completions_and_the_attention_can() -> None:
    def shares(*options: str) -> bool:
        return load_config(None, options).shares_prompts

    several = "rollout.samples_per_prompt=2"
    assert [shares(), shares(several)] == [False, True]
    assert [shares(several, f"rl.share_prompts={word}") for word in ("auto", "true", "false")] == [True, True, False]
    assert shares("rl.share_prompts=true")
    for other in ("model.attention=sdpa", "model.impl=padded"):
        assert not shares(several, other)
        with pytest.raises(InputError, match=r'rl\.share_prompts = true needs model\.attention = "packed" and'):
            shares(several, other, "rl.share_prompts=true")
    with pytest.raises(InputError, match=r"rl\.share_prompts"):
        shares("rl.share_prompts=sometimes")


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.sft.lr, config.sft.batch_size, config.data.max_length) == (1e-5, 64, 1024)
    rl = config.rl
    assert (rl.lr, rl.batch_size, rl.ppo_epochs, rl.kl_coef, rl.value_coef) == (3e-7, 64, 2, 0.05, 5.0)
    assert (rl.gamma, rl.lam, rl.clip_low, rl.clip_high, rl.value_clip) == (1.0, 0.95, 0.2, 0.2, 0.2)
    assert rl.whiten_eps == 1e-8
    reward = config.reward
    scores = (reward.correct_score, reward.partial_constant, reward.partial_base, reward.partial_scale)
    assert scores == (1.0, 0.1, 0.2, 0.1)
    contrastive = config.contrastive
    assert contrastive.negative_weight == 0.5
    assert (contrastive.temperature, contrastive.coef, contrastive.positive_clamp) == (0.2, 1e-3, 0.9)
    sampling = config.rollout
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ('rollout.servers=["http://me:pa55@host:8000"]', "CARFT_SERVER_TOKEN"),
        ('rollout.servers=["me:pa55@host:8000"]', "CARFT_SERVER_TOKEN"),
        ('rollout.servers=["http://host:8000?token=pa55"]', "CARFT_SERVER_TOKEN"),
        ("data.eval=https://me:pa55@host/test.json", "data.eval"),
        ("model.path=https://host/m?token=pa55", "model.path"),
        ('data.fields={question="sk-pa55-0123456789abcdefghij"}', "data.fields"),
    ],
)
def test_a_config_does_not_hold_secrets(option: str, where: str) -> None:
    with pytest.raises(InputError, match=where) as error:
        load_config(None, ["rollout.engine=vllm-server", option])
    assert "pa55" not in redact(str(error.value))


def test_nothing_of_the_default_config_looks_like_a_secret() -> None:
    assert Config() == load_config(None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.async_depth=1"], r'rollout\.async_depth = 1 needs engine = "vllm" or "vllm-server"'),
        (["rollout.sleep_level=1"], r'rollout\.sleep_level = 1 needs engine = "vllm"'),
        (
            ["rollout.sleep_level=2", "rollout.async_depth=1", "rollout.engine=vllm"],
            r"rollout\.sleep_level = 2 needs async_depth = 0",
        ),
        (["rollout.tensor_parallel=2", "rollout.engine=vllm"], r'tensor_parallel = 2 needs engine = "vllm-server"'),
        (['rollout.servers=["http://a:1"]'], r'servers and server_devices need engine = "vllm-server"'),
        (["rollout.engine=vllm-server", 'rollout.servers=["a:1"]'], r'"a:1" is no address: expected http://host:port'),
        (["rollout.engine=vllm-server", 'rollout.servers=["http://a","http://a"]'], "an address appears twice"),
        (
            ["rollout.engine=vllm-server", 'rollout.servers=["http://a"]', 'rollout.server_devices=["1"]'],
            "give one of the two",
        ),
        (["rollout.correction_floor=0.5"], r'correction_floor = 0\.5 needs correction = "masked"'),
        (["rollout.engine=vllm", "rollout.temperature=2.5"], r'temperature = 2\.5 needs engine = "hf"'),
        (
            ["rollout.draft_budget=32"],
            r'draft_budget = 32 needs drafts = "auto" and engine = "vllm" or "vllm-server", these are "auto" and "hf"',
        ),
        (
            ["contrastive.mode=answer", "contrastive.gradient=published"],
            r'contrastive\.mode = "answer" needs gradient = "full" or "local", this is "published"',
        ),
        (["contrastive.mode=answer", "data.answer_phrase="], r'"answer" needs annotations that end with data\.answer_'),
        (["contrastive.mode=answer", "reward.answer_type=program"], r'this is .* with reward\.answer_type = "program"'),
        (["rollout.prefix_steps=9"], r"rollout\.prefix_steps = 9 needs prefix above 0, this is 0"),
        (["rollout.prefix=1.0"], r"rollout\.prefix = 1\.0: input should be less than 1"),
        (["rollout.engine=sglang"], r"rollout\.engine = \"sglang\": input should be 'hf', 'vllm' or 'vllm-server'"),
    ],
)
def test_impossible_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rl.loss=cispo", "rl.dual_clip=3.0"], 'dual_clip = 3 needs loss = "clip", this is "cispo"'),
        (["rl.loss=cispo", "rl.ratio=sequence"], 'ratio = "sequence" needs loss = "clip", this is "cispo"'),
        (["rl.kl_estimate=k2"], 'kl_estimate = "k2" needs kl_loss_coef above 0, this is 0'),
        (["rl.kl_clamp=10.0"], "kl_clamp = 10 needs kl_loss_coef above 0, this is 0"),
        (["rl.dual_clip=1.0"], "rl.dual_clip = 1.0"),
        (["rl.estimator=rloo", "rl.kl_coef=0.0"], "samples_per_prompt must be at least 2, this is 1"),
    ],
)
def test_variants_of_the_loss_that_cannot_be(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match="rl") as error:
        load_config(None, options)
    assert message in str(error.value)
