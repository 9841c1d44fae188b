"""Loss on held-out rows, by modality and by how far into its document a token stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from ringworld_jobs.evaluate_spec import TaskSpec, ValidationTask
from ringworld_jobs.spec import LearningRateSpec, StageSpec
from ringworld_model.loss import bucket_edges
from ringworld_workers.data.loader import KINDS, SourceKind, StageLoader
from ringworld_workers.evaluate.held_out import SCORES_BY_KIND
from ringworld_workers.evaluate.row_loss import score_row
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject


class ValidationRows:
    """Scores the same rows as `validation_rows` of a stage does, each of them an item."""

    name = "validation"

    def __init__(self, settings: TaskSpec, subject: Subject) -> None:
        """Take what is asked; the data is opened when it is needed."""
        assert isinstance(settings, ValidationTask)
        self._settings, self._subject = settings, subject

    @cached_property
    def _loader(self) -> StageLoader:
        subject = self._subject
        stage = StageSpec(
            name=subject.stage_name,
            context_length=subject.context_length,
            global_batch_tokens=subject.context_length,
            mixture=dict(subject.mixture),
            # The rest of a stage's fields says how it is trained.
            rope_theta=1.0,
            steps=1,
            learning_rate=LearningRateSpec(peak=1.0),
        )
        return StageLoader(subject.sources, stage, subject.seed, data=subject.data)

    def items(self) -> Sequence[Item]:
        """The held-out rows that there are."""
        found = []
        for kind in KINDS:
            rows = len(self._loader.held_out_rows(kind, self._settings.rows))
            facts = [{"source_kind": kind, "row": row} for row in range(rows)]
            found += [Item(f"{kind}/{each['row']}", each) for each in facts]
        return found

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """Score the rows; see ``Task.run``."""
        for item in items:
            kind: SourceKind = item.facts["source_kind"]
            row = self._loader.held_out_rows(kind, self._settings.rows)[item.facts["row"]]
            yield {"id": item.id, **score_row(ring, row).record()}

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``loss_text``, ``accuracy_text``, ``targets_text`` and the same of vision and of the
        captions of held-out clips; ``loss_text_from_N``: of targets from N tokens into their
        document to twice as far."""
        figures: dict[str, float] = {}
        for kind, names in SCORES_BY_KIND.items():
            mine = [record for record in records if record["source_kind"] == kind]
            if not mine:
                continue
            nll, weight, correct, by_position = (
                torch.tensor([record[key] for record in mine], dtype=torch.float64).sum(0)
                for key in ("nll", "weight", "correct", "by_position")
            )
            for modality, name in enumerate(names):
                if name is None or weight[modality] <= 0:
                    continue
                figures[f"loss_{name}"] = float(nll[modality] / weight[modality])
                figures[f"accuracy_{name}"] = float(correct[modality] / weight[modality])
                figures[f"targets_{name}"] = float(weight[modality])
                starts = bucket_edges(self._subject.context_length)[:-1]
                for start, (part, share) in zip(
                    starts, by_position[modality].tolist(), strict=False
                ):
                    if share > 0:
                        figures[f"loss_{name}_from_{start}"] = part / share
        return figures
