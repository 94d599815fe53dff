"""LoRA over any task: the task's models stay as they were given, and adapters beside them are what is trained.

The tree is the task's own, with `lora/MODEL/…/kernel/{a,b,scale}` beside it (see `jdiff.lora`), and with PiSSA `start/…`, the
adapters as they began, which are taken off the base again. A checkpoint holds these alone, and names the base by its hash.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jdiff import lora, tree
from jdiff.tasks import Batch, Losses, Task
from jdiff.tasks.wrapper import Wrapper


def parse_rules(settings: Any) -> list[lora.Rule]:
    """A config's `lora` as rules: targets are `PATTERN`, or `PATTERN@RANK` and `PATTERN@RANK/ALPHA` where they differ.

    ValueError for a rank or alpha that is no number.
    """
    rules = []
    for target in settings.targets:
        pattern, _, sizes = target.partition("@")
        rank, _, alpha = sizes.partition("/")
        try:
            own = (int(rank) if rank else settings.rank, float(alpha) if alpha else None)
        except ValueError:
            raise ValueError(f"lora.targets={target!r}: write PATTERN, PATTERN@RANK or PATTERN@RANK/ALPHA") from None
        rules.append(lora.Rule(pattern, own[0], own[1] if own[1] is not None or rank else settings.alpha))
    return rules


class Adapters(Wrapper):
    """See `Wrapper`."""

    frozen = r"(?!lora/).*|lora/.*/kernel/scale"
    base = r"(?!lora/|start/).*"

    def __init__(self, task: Task, config: Any):
        super().__init__(task, f"LoRA of {task.title}")
        self.settings = config.lora
        if not task.adaptable:
            raise ValueError(f"lora.rank={config.lora.rank}: adapters of task={config.task!r} cannot be trained; set 0")
        if config.init_from is None:
            raise ValueError("init_from is missing: give the checkpoint that the adapters are trained on")
        if config.lora.method == "pissa" and config.lora.dora:
            raise ValueError(
                "lora.method='pissa' does not go with lora.dora=true: both change what the base counts for"
            )
        self.rules = parse_rules(config.lora)
        self._digests: dict[str, str] = {}

    def given(self) -> Any:
        """The base; its hashes are taken on the way."""
        given = self.task.given()
        self._digests = self._digests or {name: tree.fingerprint(given[name]) for name in self.task.adaptable}
        return given

    def init(self, key: jax.Array, given: Any) -> Any:
        """The base, and adapters that change nothing yet."""
        full, s = self.task.init(key, given), self.settings
        chosen = {name: full[name] for name in self.task.adaptable}
        settings = {"method": s.method, "rslora": s.rslora, "dora": s.dora}
        adapters = lora.init(jax.random.fold_in(key, 1), chosen, self.rules, **settings)
        if s.method == "pissa":
            full = {**full, "start": adapters}
        return {**full, "lora": adapters}

    def _attached(self, full: Any, key: jax.Array | None = None) -> Any:
        """The task's own tree, the adapters in it. key: of their dropout."""
        models = {name: params for name, params in full.items() if name not in ("lora", "start")}
        if "start" in full:
            models = lora.attach(models, full["start"], -1.0)
        return lora.attach(models, full["lora"], dropout=0.0 if key is None else self.settings.dropout, key=key)

    def loss(self, full: Any, batch: Batch, keys_B: jax.Array) -> Losses:
        """The task's, of the adapted models."""
        return self.task.loss(self._attached(full, jax.random.fold_in(keys_B[0], 1)), batch, keys_B)

    def changed(self, full: Any) -> Any:
        """Its models adapted, without dropout."""
        return self._attached(full)

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """The task's, and `lora`: the adapted models with the hash of what they were, and how the adapters were made."""
        if not self._digests:
            self.given()
        settings = {k: v for k, v in self.settings.to_dict().items() if k != "any_base"}
        return {**self.task.facts(measures), "lora": {**settings, "base": self._digests}}
