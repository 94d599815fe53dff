"""Scores of a run while it trains: of samples of its average, against its own data."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jdiff.data import Source
from jdiff.evaluate.features import Features
from jdiff.evaluate.kept import kept_features
from jdiff.evaluate.networks import open_network
from jdiff.evaluate.pictures import batches
from jdiff.evaluate.samples import Samples
from jdiff.evaluate.scores import Reference, check_metrics, scores, write_scores
from jdiff.report import SCORES


class Scoring:
    """What a config's `eval` asks for: the network, opened, and the data as reference.

    ValueError for a network that cannot be opened, a metric that it or the data has nothing for, or data that are no pictures.
    """

    def __init__(self, config: Any, source: Source, mesh: Mesh, workdir: Path | None):
        self.config, self.source, self.mesh, self.workdir = config, source, mesh, workdir
        if source.kind != "image":
            raise ValueError(
                f"eval_every={config.eval_every}: the data are {source.kind}s, which no network scores; set 0"
            )
        if "clip" in config.eval.metrics:
            raise ValueError("eval.metrics: clip takes prompts, and a run of classes has none")
        self.network = open_network(config.eval.network)
        check_metrics(config.eval.metrics, source.name, network=self.network)

    @cached_property
    def reference(self) -> Reference:
        """The data's features: eval.reference pictures at most, spread over all. A run of one process keeps them by its workdir,
        so that it makes them once. DataError for a picture that cannot be read."""
        d, most = self.config.data, self.config.eval.reference
        facts = {"pictures": self.source.fingerprint, "shape": self.source.shape, "num": most}
        # of several processes one might find more of them there than another
        folder = self.workdir / "features" if self.workdir and jax.process_count() == 1 else None
        found = self._features(partial(batches, self.source, most), folder, facts)
        title = (d.path or d.name) + (f":{d.split}" if d.split != "all" else "") + (f" ({d.only})" if d.only else "")
        return Reference.of(f"{len(found)} of {title}", found)

    def __call__(self, samples: Samples, step: int) -> dict[str, float]:
        """The metrics of a step's samples, which scores.jsonl gets too, with their intervals."""
        reference, settings, seed = self.reference, self.config.eval, self.config.seed
        found = self._features(samples.made, None, {})
        results = scores(found, reference, settings.metrics, resamples=settings.resamples, seed=seed)
        if self.workdir and jax.process_index() == 0:
            facts = {"step": step, "weights": "ema", **samples.facts, "samples": str(self.workdir), "count": len(found)}
            facts |= {"reference": reference.title, "network": self.network.title, "seed": seed}
            write_scores(self.workdir / SCORES, facts, results)
        return {name: score.value for name, score in results.items()}

    def _features(self, made: Any, folder: Path | None, facts: dict[str, Any]) -> Features:
        return kept_features(self.network, made, folder, facts, mesh=self.mesh)
