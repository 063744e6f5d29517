"""A plan as a table."""

from carft_fast.core import Table
from carft_fast.plan.gpus import MATMUL_SHARE, MEMORY_SHARE, USABLE
from carft_fast.plan.resources import WASTED_PER_TOKEN, DraftsEstimate, Estimate, PhaseEstimate, StageEstimate


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def estimate_table(found: Estimate) -> Table:
    """What `carft-fast plan` prints."""
    where = f"{found.gpus} x {found.gpu.title}, {found.strategy}" if found.gpus > 1 else f"one {found.gpu.title}"
    table = Table("plan", "", title=f"prediction, nothing was run on a GPU: {where}")
    table.add_row("memory of a GPU", f"{gib(found.gpu.memory)}, of them {USABLE:.0%} to use: {gib(found.usable)}")
    table.add_row("sampling", found.sampler_problem or found.sampler)
    for stage, result in found.stages.items():
        table.add_section()
        table.add_row(stage, verdict(found, stage))
        table.add_row("  micro_batch_tokens", f"{result.micro_batch_tokens:,}; {_largest(result)}")
        for name, phase in result.phases.items():
            table.add_row(f"  {name}", _memory(phase))
        table.add_row("  a step, predicted", _seconds(result))
        if result.drafts:
            table.add_row("  rollout with drafts, predicted", _drafts(found, result.drafts))
        counts = [phase for name, phase in result.phases.items() if name != "load"]
        launches, syncs = sum(phase.launches for phase in counts), sum(phase.syncs for phase in counts)
        table.add_row("  a step, on the host", f"about {launches:,} launches, {syncs:,} waits for the GPU")
    table.add_section()
    table.add_row(
        "seconds",
        f"the larger of FLOPs / {MATMUL_SHARE:.0%} of the peak and bytes / {MEMORY_SHARE:.0%} of the bandwidth; "
        f"without communication and launches; adapters count as all weights; {WASTED_PER_TOKEN:g} guessed tokens are "
        "wasted for each token of a completion, fewer where the budget allows no more",
    )
    return table


def verdict(found: Estimate, stage: str) -> str:
    """Whether a stage fits, in a few words."""
    peak = found.stages[stage].peak
    if found.sampler_problem:
        return f"does not fit: {found.sampler_problem}"
    if found.fits(stage):
        return f"fits: {gib(peak)} of {gib(found.usable)}"
    return f"does not fit: {gib(peak)}, {gib(peak - found.usable)} more than there are"


def _largest(result: StageEstimate) -> str:
    if result.largest_micro_batch_tokens is None:
        return "not even one sequence of data.max_length fits"
    whole = ", all sequences of a GPU: more changes nothing" if result.whole_mini_batch else ""
    return f"the largest that fits is {result.largest_micro_batch_tokens:,}{whole}"


def _memory(phase: PhaseEstimate) -> str:
    parts = ", ".join(f"{name} {gib(size)}" for name, size in list(phase.parts.items())[:3])
    beside = f" + {gib(phase.sampler)} of the sampler" if phase.sampler else ""
    return f"{gib(phase.trainer)}{beside}: {parts}"


def _drafts(found: Estimate, drafts: DraftsEstimate) -> str:
    budget, sequences = f"rollout.draft_budget = {drafts.budget}", f"{drafts.sequences} sequences at once"
    if drafts.guesses < 1:
        return f"{budget} leaves no guess for {sequences}; {2 * drafts.sequences} would leave one for each"
    times = [f"at {n} tokens a forward {whole:.2f} s ({short:.2f})" for n, (whole, short) in drafts.seconds.items()]
    limit = found.gpu.sequences_for_drafts(WASTED_PER_TOKEN)
    return (
        f"{', '.join(times)}; {budget} leaves {drafts.guesses} guess{'es' * (drafts.guesses > 1)} for each of "
        f"{sequences}; worthless from about {limit:.0f} sequences at once on a GPU"
    )


def _seconds(result: StageEstimate) -> str:
    longest, short = ({**seconds, "all": sum(seconds.values())} for seconds in result.seconds)
    return ", ".join(f"{phase} {longest[phase]:.2f} s ({short[phase]:.2f})" for phase in longest) + (
        "; all sequences of data.max_length tokens (completions of a quarter of their limit)"
    )
