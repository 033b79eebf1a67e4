"""OPTIMA on CLIP in a loop of one's own: a bandit picks the modules that are distilled next."""

import torch

import optima_fast


def main(student, teacher, batches, probe, rounds=8, period=4, lr=1e-3, log=print):
    """Distils; returns how often each arm was chosen."""
    distiller = optima_fast.Distiller.from_models(
        student, teacher, probe, hidden_scale="variance", reduction="mean", kl_weight=1.0
    )
    log(distiller.summary)
    arms = optima_fast.arms(distiller.modules_matched)  # text, vision, both
    policy = optima_fast.bandit.make("thompson", len(arms), seed=0)
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=lr)
    terms = {"predict": lambda output, batch: output.loss, "divergence": divergence}
    before = distiller.measure(probe, **terms)
    counts = dict.fromkeys(arms, 0)
    for turn in range(rounds):
        arm = policy.select()
        for step in range(period):
            batch = batches[(turn * period + step) % len(batches)]
            optimizer.zero_grad()
            distiller(batch, arms[arm], **terms).total.backward()
            optimizer.step()
        after = distiller.measure(probe, **terms)
        reward, _ = optima_fast.distill.relative_drop(before._asdict(), after._asdict())
        policy.update(arm, reward)
        before, counts[arms[arm]] = after, counts[arms[arm]] + 1
        log(f"round {turn}: {'+'.join(arms[arm])}, reward {reward:.3f}, KL {after.kl:.4f}")
    distiller.close()
    return counts


def divergence(student, teacher, batch):
    """KL of which image belongs to each text."""
    s, t = (x.logits_per_text.log_softmax(-1) for x in (student, teacher))
    return torch.nn.functional.kl_div(s, t, reduction="batchmean", log_target=True)
