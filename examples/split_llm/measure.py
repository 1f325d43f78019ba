"""What streaming hides: one prompt, streamed and sent in one piece at the end.

Both forms run the same processes, the same prompt and the same blocks' sizes, by
turns, so that what else the machine does concerns both alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .driver import Settings, Split, both_processes, say
from .model import Model, Tokenizer, prepare_checkpoint
from .paged import blocks_for
from .timeline import Timeline

# Repeated until the prompt is as long as it should be.
TEXT = "The quick brown fox jumps over the lazy dog and runs along the river. "
FORMS = {"streamed": True, "at the end": False}


@dataclass(frozen=True)
class Measured:
    """What one prompt cost in both forms.

    Attributes:
      n_prompt_tokens: Tokens of the prompt.
      splits: Each form's runs, in their order.
      whole_tokens: What the whole model says to it.
    """

    n_prompt_tokens: int
    splits: dict[str, list[Split]]
    whole_tokens: list[int]

    @property
    def equal(self) -> bool:
        """Whether every run gave the tokens of the whole model."""
        return all(
            split.tokens == self.whole_tokens
            for splits in self.splits.values()
            for split in splits
        )

    def typical(self, form: str) -> Timeline:
        """The run whose last bytes came as late as half of the runs' did."""
        lines = sorted(
            (split.timeline for split in self.splits[form]), key=lambda x: x.exposed
        )
        return lines[len(lines) // 2]

    def rows(self) -> list[dict[str, object]]:
        """Sum each form up, for a table."""
        rows = []
        for form, splits in self.splits.items():
            lines = [split.timeline for split in splits]
            rows.append(
                {
                    "form": form,
                    "runs": len(splits),
                    "MB": round(splits[0].bytes / 1e6, 1),
                    "layers in place before the last is computed": (
                        f"{min(x.n_hidden for x in lines)} of {lines[0].n_layers}"
                    ),
                    "until all are, ms": _spread([x.exposed for x in lines]),
                    "until the first step, ms": _spread(
                        [x.until_first_step for x in lines]
                    ),
                }
            )
        return rows


def _spread(seconds: Sequence[float]) -> str:
    """Say median, least and most, in milliseconds."""
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    return f"{1e3 * middle:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"


async def measure(rounds: int, prompt_tokens: int, settings: Settings) -> Measured:
    """Run one prompt ``rounds`` times in each form, after one run to warm up.

    Raises:
      WorkerError: One of the processes failed.
    """
    say("loading the model")
    checkpoint = await asyncio.to_thread(prepare_checkpoint, settings.checkpoints, say)
    model = await asyncio.to_thread(Model, checkpoint)
    tokenizer = Tokenizer(checkpoint)
    token_ids = tokenizer.encode_prompt(TEXT * prompt_tokens)[:prompt_tokens]
    say(f"running {prompt_tokens} tokens whole, for comparison")
    whole = await asyncio.to_thread(model.run_whole, token_ids, settings.max_new_tokens)
    n_blocks = blocks_for(prompt_tokens)
    splits: dict[str, list[Split]] = {form: [] for form in FORMS}
    async with both_processes(checkpoint, n_blocks, settings.host) as pair:
        await pair.run("warm-up", token_ids, settings)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            forms = list(FORMS.items())
            for form, streamed in forms if number % 2 else reversed(forms):
                name = f"{form} {number}"
                split = await pair.run(name, token_ids, settings, streamed=streamed)
                splits[form].append(split)
    return Measured(prompt_tokens, splits, whole)


def as_json(measured: Measured) -> dict[str, object]:
    """Everything that was measured, as plain data."""
    return {**dataclasses.asdict(measured), "summary": measured.rows()}
