"""Own rows and an own reward, which reads a column: checks that a completion has to pass."""

from carft_fast import Example, Trainer, load_config

rows = [
    {
        "question": f"Ada has {a} apples. Ada buys {b} apples. How many apples does Ada have now?",
        "cot": f"{a} + {b} = {a + b}.",
        "answer": a + b,
        "checks": [f"{a} + {b}", f"= {a + b}"],
    }
    for a in range(2, 10)
    for b in range(2, 10)
]


def share_of_checks(completions: list[str], examples: list[Example]) -> list[float]:
    """Scores from 0 to 1; a completion that passes every check counts as right."""
    scores = []
    for text, example in zip(completions, examples, strict=True):
        checks = example.extra["checks"]
        scores.append(sum(check in text for check in checks) / len(checks))
    return scores


config = load_config(
    method="carft",
    overrides={
        "model.path": "synthetic",  # a tiny untrained model; name a folder or a Hub id here
        "data.max_length": 160,
        "rollout.max_new_tokens": 16,
        "sft.max_steps": 20,
        "sft.batch_size": 16,
        "sft.lr": 3e-3,
        "rl.max_steps": 2,
        "rl.batch_size": 8,
        "rl.mini_batch_size": 8,
    },
)
trainer = Trainer(
    config,
    train=rows[8:],
    eval=rows[:8],
    reward=share_of_checks,
    output_dir="runs/own_rows",
)
summary = trainer.train()
print(f"{summary['sft_accuracy']:.1%} after SFT, {summary['final_accuracy']:.1%} after RL")
trainer.save("runs/own_rows_model")  # an ordinary folder for transformers or vLLM
