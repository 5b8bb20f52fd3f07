"""The gold preference: what the simulated people of the benches like. No training code knows it but by their votes."""

from trainer import dialogues
from trainer.dialogues import Prompt

MEAN_DIFFERENCE = 2.4
"""Of the gold scores of two answers to one prompt, in logits of the votes, by scaling: votes are as noisy as people."""
STARTER_SCALE = 3.16
"""What does that for the starter model at temperature 1: 3.25, 3.11 and 3.13 over three times 500 prompts."""


def worth(prompt: Prompt, text: str, *, finished: bool) -> float:
    """Of an answer, before scaling, from -1.5 to 5: right, warm, concise and finished ones are better. `finished`: the
    model ended it, no limit did."""
    correct = 1.5 * dialogues.is_correct(prompt, text)
    ended = finished and dialogues.is_finished(text)
    return correct + 0.75 * dialogues.warmth(text) + dialogues.concision(text) + ended
