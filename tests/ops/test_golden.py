"""Every operator against the published code's own numbers, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from carft_kernels import (
    gae,
    kl_shaped_reward,
    lcs_mask,
    masked_infonce,
    policy_loss,
    token_logprob,
    value_loss,
    value_pool,
    whiten,
)

from ..conftest import assert_golden
from .checks import DEVICE

Rows = list[tuple[int, int]]


def test_token_logprob(golden: Any) -> None:
    for name, _, a in golden("logsoftmax").cases():
        logits = a["logits"].flatten(0, 1).requires_grad_()
        logprob, _ = token_logprob(logits, a["index"].flatten())
        (gradient,) = torch.autograd.grad(logprob, logits, a["upstream"].flatten())
        assert_golden(logprob, a["out"].flatten(), name=name)
        assert_golden(gradient, a["grad_logits"].flatten(0, 1), loose=True, name=name)


def pool_padded(hidden_BLD: Tensor, value_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The operator on padded rows: each row a packed sequence, the mask where its tokens count."""
    rows, length = mask_BL.shape
    cu_seqlens = torch.arange(0, rows * length + 1, length)
    pooled, weights = value_pool(hidden_BLD.flatten(0, 1), value_BL.flatten(), cu_seqlens, mask_T=mask_BL.flatten())
    return pooled, weights.view(rows, length)


def test_value_pool(golden: Any) -> None:
    empty_rows = 0
    for name, _, a in golden("pooling").cases():
        hidden, value = a["hidden"].requires_grad_(), a["value"].requires_grad_()
        pooled, weights = pool_padded(hidden, value, a["emb_mask"])
        d_hidden, d_value = torch.autograd.grad(pooled, (hidden, value), a["upstream"])
        filled = a["emb_mask"].any(1)
        assert_golden(pooled[filled], a["z"][filled], name=name)
        assert_golden(weights[filled], a["weight"][filled], name=name)
        assert_golden(d_hidden[filled], a["grad_hidden"][filled], loose=True, name=name)
        assert_golden(d_value[filled], a["grad_value"][filled], loose=True, name=name)
        # the published code pools an empty row over everything, pads included; here it is zeros without gradient
        for x in (pooled, weights, d_hidden, d_value):
            assert not x[~filled].any()
        empty_rows += int((~filled).sum())
    assert empty_rows > 0, "no empty row among the vectors: that half of the test ran on nothing"


def test_masked_infonce_in_its_four_variants(golden: Any) -> None:
    """{broadcast, masked_mean} x {constgather, diffgather}: published training to paper mathematics (our default)."""
    for name, params, a in golden("cl_pos").cases():
        z_1, _ = pool_padded(a["base_hidden"], a["base_value"], a["base_mask"])
        assert_golden(z_1, a["z_1"], name=name)
        for variant in (
            "broadcast_constgather",
            "masked_mean_constgather",
            "broadcast_diffgather",
            "masked_mean_diffgather",
        ):
            hidden, value = a["pred_hidden"].clone().requires_grad_(), a["vpreds"].clone().requires_grad_()
            z_2, _ = pool_padded(hidden, value, a["model_mask"])
            z_2.retain_grad()
            others = [a["z_other"]] if "z_other" in a else []
            candidates = torch.cat([z_2, *others])
            anchor = a["z_1"]
            if variant.endswith("constgather"):
                # candidates without gradient, the positive's own similarity with it: take the denominators from one
                # call and the numerator from another
                _, constant = masked_infonce(anchor, candidates.detach(), temperature=params["tau"])
                cosine = torch.cosine_similarity(anchor, z_2)
                pull = (cosine.detach().clamp(max=0.9) - cosine.clamp(max=0.9)) / params["tau"]
                row_loss = constant + pull
                mean = torch.where(a["corr_mask"], row_loss, 0.0).sum() / a["corr_mask"].sum().clamp(min=1)
            else:
                mean, row_loss = masked_infonce(
                    anchor, candidates, row_mask_N=a["corr_mask"], temperature=params["tau"]
                )
            assert_golden(row_loss, a["row_loss"], loose=True, name=name)
            if variant.startswith("broadcast"):
                loss = row_loss.sum() * bool(a["corr_mask"].any())
                assert_golden(loss, a["loss_official"], loose=True, name=name)
            else:
                loss = mean
                assert_golden(loss, a["loss_masked_mean"], loose=True, name=name)
            loss.backward()
            gradients = {"z2": z_2.grad, "vpreds": value.grad, "pred_hidden": hidden.grad}
            for key, gradient in gradients.items():
                expected = a.get(f"grad_{key}_{variant}")
                if expected is not None:
                    assert gradient is not None
                    assert_golden(gradient, expected, loose=True, name=f"{name} {variant} {key}")


def test_the_published_loss_is_a_sum_over_all_rows(golden: Any) -> None:
    """Departure 1 of the published code, both numbers: a reader can see what its mask does."""
    _, params, a = next(golden("cl_pos").cases("pos0"))
    loss, row_loss = masked_infonce(a["z_1"], a["z_2"], row_mask_N=a["corr_mask"], temperature=params["tau"])
    assert float(row_loss.sum()) == pytest.approx(5.5697, abs=1e-4)
    assert float(a["loss_official"]) == pytest.approx(5.5697, abs=1e-4)
    assert float(loss) == pytest.approx(1.3613, abs=1e-4)


@pytest.mark.parametrize("version", ["v8", "v9"])
def test_negative_signal_as_published(golden: Any, version: str) -> None:
    """Masks as stored, the published code's defects inside: embeddings, row losses, both reductions, all gradients.

    v9 is half of it and half of the positive signal.
    """
    checked = gradients = 0
    for name, params, a in golden("cl_neg").cases():
        if params["version"] != version:
            continue
        hidden, value = a["pred_hidden"].clone().requires_grad_(), a["vpreds"].clone().requires_grad_()
        z_2, _ = pool_padded(hidden, value, a["model_common_mask"])
        z_3, _ = pool_padded(hidden, value, a["model_diff_mask"])
        for ours, mask, key in ((z_2, "model_common_mask", "z_2"), (z_3, "model_diff_mask", "z_3")):
            filled = a[mask].any(1)
            assert_golden(ours[filled], a[key][filled], name=f"{name} {key}")
        rows, tau = a["neg_row_mask"], params["tau"]
        full = bool(a["model_common_mask"].any(1).all() and a["model_diff_mask"].any(1).all())
        for gather in ("constgather", "diffgather"):
            negatives = z_3.detach() if gather == "constgather" else z_3
            if not full:  # the published code pools an empty part over the whole row: its embeddings as stored
                z_2, negatives = a["z_2"], a["z_3"]
            _, denominator = masked_infonce(z_2, torch.cat([z_2, negatives]), temperature=tau, positive_clamp=1.0)
            cosine = torch.cosine_similarity(a["z_1"], z_2)
            row_loss = denominator + (1.0 - cosine.clamp(max=0.9)) / tau
            assert_golden(row_loss, a["row_loss_neg"], loose=True, name=name)
            mean = torch.where(rows, row_loss, 0.0).sum() / rows.sum().clamp(min=1)
            assert_golden(mean, a["loss_neg_masked_mean"], loose=True, name=name)
            checked += 1
            if not full:
                continue
            losses = {"broadcast": row_loss.sum() * bool(rows.any()), "masked_mean": mean}
            if version == "v9":
                for reduction, loss in _positive_part(hidden, value, a, params, gather).items():
                    losses[reduction] = (losses[reduction] + loss) / 2
                assert_golden(losses["broadcast"], a["loss_official"], loose=True, name=name)
                assert_golden(losses["masked_mean"], a["loss_masked_mean"], loose=True, name=name)
            for reduction, loss in losses.items():
                found = torch.autograd.grad(loss, (value, hidden), retain_graph=True)
                for key, gradient in zip(("vpreds", "pred_hidden"), found, strict=True):
                    expected = a.get(f"grad_{key}_{reduction}_{gather}")
                    if expected is not None:
                        assert_golden(gradient, expected, loose=True, name=f"{name} {key} {reduction} {gather}")
                        gradients += 1
    assert checked >= 8, "too few vectors apply"
    assert gradients >= 6, "too few gradients apply"


def _positive_part(
    hidden: Tensor, value: Tensor, a: dict[str, Tensor], params: dict[str, Any], gather: str
) -> dict[str, Tensor]:
    ids, tau = a["model_ids"], params["tau"]
    completion = (torch.arange(ids.shape[1]) >= params["prompt_len"]) & (ids != params["pad_id"])
    z_2, _ = pool_padded(hidden, value, completion)
    assert_golden(z_2, a["z_2_pos"])
    candidates = z_2.detach() if gather == "constgather" else z_2
    _, denominator = masked_infonce(a["z_1_pos"], candidates, temperature=tau, positive_clamp=1.0)
    cosine, constant = (torch.cosine_similarity(a["z_1_pos"], x) for x in (z_2, candidates))
    row_loss = denominator + (constant - cosine.clamp(max=0.9)) / tau
    rows = a["pos_row_mask"]
    mean = torch.where(rows, row_loss, 0.0).sum() / rows.sum().clamp(min=1)
    return {"broadcast": row_loss.sum() * bool(rows.any()), "masked_mean": mean}


def completion_rows(mask_BL: Tensor, prompt_length: int) -> Rows:
    """[start, end) of the positions that choose completion tokens, by row."""
    return [(prompt_length - 1, prompt_length - 1 + int(row[prompt_length - 1 :].sum())) for row in mask_BL]


def pack_rows(x_BL: Tensor, rows: Rows) -> Tensor:
    return torch.cat([x[s:e] for x, (s, e) in zip(x_BL, rows, strict=True)])


def offsets(rows: Rows) -> Tensor:
    return torch.tensor([0, *(e - s for s, e in rows)]).cumsum(0)


def test_reward_gae_and_whitening(golden: Any) -> None:
    checked = 0
    for name, params, a in golden("rollout").cases():
        if "ids" not in a:
            x, mask = a["values_all"], a["mask_all"]
            whitened = whiten(x.flatten(), mask.flatten()).view(x.shape)[0]
            assert_golden(whitened[mask[0]], a["whitened_rank0"][mask[0]], name=name)
            checked += 1
            continue
        rows = completion_rows(a["mask"], params["prompt_len"])
        packed = torch.zeros_like(a["mask"])
        for row, (s, e) in zip(packed, rows, strict=True):
            row[s:e] = True
        is_eos = a["ids"] == params["eos_id"]
        in_prompt, repeated = is_eos[:, : params["prompt_len"]].any(), (is_eos.sum(1) > 1).any()
        if in_prompt or repeated or not torch.equal(packed, a["mask"]):
            continue  # departures 7 and 8: masks and scores made from token ids; a completion here ends at its EOS
        cu = offsets(rows)
        old, ref = pack_rows(a["old_logprob"], rows), pack_rows(a["ref_logprob"], rows)
        reward = kl_shaped_reward(a["reward"], old, ref, cu, kl_coef=params["kl_coef"])
        assert_golden(reward, pack_rows(a["rew"], rows), name=name)
        advantage, return_ = gae(reward, pack_rows(a["value"], rows), cu, gamma=params["gamma"], lam=params["lam"])
        assert_golden(advantage, pack_rows(a["adv"], rows), name=name)
        assert_golden(return_, pack_rows(a["ret"], rows), name=name)
        if "adv_whitened" in a:
            assert_golden(whiten(pack_rows(a["adv"], rows)), pack_rows(a["adv_whitened"], rows), name=name)
        checked += 1
    assert checked >= 4, "too few vectors apply"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_lcs_mask(golden: Any, impl: Any) -> None:
    """The very subsequence of the published code, all pairs in one call."""
    pairs = [a for name, params, a in golden("lcs").cases() if impl == "torch" or params["m"] * params["n"] <= 2500]
    assert len(pairs) > 20, "too few vectors apply"
    x, y = (torch.cat([a[side] for a in pairs]).to(DEVICE) for side in "xy")
    x_cu, y_cu = (torch.tensor([0, *(len(a[side]) for a in pairs)]).cumsum(0) for side in "xy")
    in_x, in_y = (z.cpu() for z in lcs_mask(x, x_cu, y, y_cu, impl=impl))
    for ours, cu, key in ((in_x, x_cu, "out_x"), (in_y, y_cu, "out_y")):
        for i, a in enumerate(pairs):
            assert torch.equal(ours[cu[i] : cu[i + 1]].nonzero()[:, 0].int(), a[key].int()), i


def test_policy_and_value_loss(golden: Any) -> None:
    for name, params, a in golden("ppo").cases():
        mask = a["mask"]
        dtype = a["logprob"].dtype
        weight_BL = mask.to(dtype) / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))
        logprob, vpreds = a["logprob"].requires_grad_(), a["vpreds"].requires_grad_()
        policy, _ = policy_loss(
            logprob.flatten(),
            a["old_logprob"].flatten(),
            a["adv"][:, :-1].flatten(),
            weight_T=weight_BL[:, :-1].flatten(),
        )
        value, _ = value_loss(
            vpreds.flatten(), a["value_old"].flatten(), a["ret"].flatten(), weight_T=weight_BL.flatten()
        )
        assert_golden(policy, a["pg_loss"], name=name)
        assert_golden(value, a["vf_loss"], name=name)
        loss = policy + params["vf_coef"] * value + params["cl_coef"] * a["cl_loss"]
        d_logprob, d_vpreds = torch.autograd.grad(loss, (logprob, vpreds))
        for ours, expected in ((loss, a["loss"]), (d_logprob, a["grad_logprob"]), (d_vpreds, a["grad_vpreds"])):
            assert_golden(ours, expected, loose=True, name=name)
