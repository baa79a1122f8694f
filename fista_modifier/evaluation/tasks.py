"""Zero-shot tasks, by the language model evaluation harness (lm-eval)."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import httpx

from fista_modifier.evaluation.results import digest
from fista_modifier.host import package_versions

__all__ = ["PAPER_TASKS", "TaskSuite"]

PAPER_TASKS = (
    "arc_challenge",
    "arc_easy",
    "winogrande",
    "rte",
    "boolq",
    "qnli",
    "wnli",
)
"""The tasks of the paper's Table 5, by their names in lm-eval."""
DEFINITIONS = {".yaml", ".yml", ".py"}
"""The endings of the files that define tasks."""
SHOWN = 3
"""The most tasks of a group that an error message names."""


class TaskSuite:
    """
    Zero-shot tasks whose definitions and data have been loaded. What is missing is thus
    known before a model is loaded.

    :param names: names of tasks or groups of tasks, as lm-eval calls them
    :param folder: a folder with definitions of further tasks, in lm-eval's YAML
    :param limit: use only so many examples of each task
    :raises RuntimeError: if lm-eval is not installed
    :raises FileNotFoundError: if the folder does not exist
    :raises ValueError: for a name that is no task, or a group that has no score
    :raises ConnectionError: if the data of a task cannot be downloaded
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None = None,
        limit: int | None = None,
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"the folder of tasks {folder} does not exist")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RuntimeError(
                "zero-shot tasks need lm-eval: pip install 'fista-modifier[eval]', or "
                "name only texts (--text)"
            ) from error
        self.limit = limit
        self._folder = folder
        self._manager = TaskManager(include_path=str(folder) if folder else None)
        known = [*self._manager.all_subtasks, *self._manager.all_groups]
        self._tasks: dict[str, Any] = {}
        for name in names:
            if name not in known:
                close = get_close_matches(name, known, n=3)
                raise ValueError(
                    f"lm-eval has no task '{name}'"
                    + (f"; did you mean {' or '.join(close)}?" if close else "")
                )
            self._tasks[name] = self._load(name)

    @property
    def definitions(self) -> dict[str, str]:
        """
        A text for each task, by its name, that changes with lm-eval's version and with
        the definitions in the folder, on which scores depend.
        """
        files = sorted(self._folder.rglob("*")) if self._folder else []
        contents = [
            (file.name, file.read_bytes())
            for file in files
            if file.suffix in DEFINITIONS and file.is_file()
        ]
        state = digest([package_versions("lm-eval"), contents])
        return dict.fromkeys(self._tasks, state)

    def _load(self, name: str) -> Any:
        try:
            loaded = self._manager.load([name])
        except (OSError, httpx.HTTPError) as error:
            raise ConnectionError(
                f"the data of the task {name} could not be read ({error}); check the "
                "network, or define the task on local files: --task-path FOLDER"
            ) from error
        group = loaded.get("groups", {}).get(name)
        if group is not None and not group.aggregate_metric_list:
            examples = ", ".join(list(loaded["tasks"])[:SHOWN])
            raise ValueError(
                f"lm-eval has no score of the group '{name}' as a whole: name its "
                f"tasks instead, such as {examples}"
            )
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        return loaded

    def score(self, model: Any, name: str) -> dict[str, Any]:
        """
        Score a model on a task without examples in the prompt (zero-shot).

        :param model: a language model of lm-eval
        :param name: name of one of the suite's tasks
        :return: "metrics", each with its "value" and "stderr" (None where lm-eval has
            none), the number of "examples" and the "limit" that they were taken with
        :raises ValueError: if lm-eval gives no metric
        """
        import lm_eval

        outcome = lm_eval.evaluate(
            lm=model, task_dict=self._tasks[name], limit=self.limit, log_samples=False
        )
        values = outcome["results"][name]
        metrics = {}
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            metrics[metric if variant == "none" else f"{metric} ({variant})"] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
            }
        if not metrics:
            # A group may be defined to aggregate what its tasks do not measure.
            raise ValueError(f"lm-eval gives no metric of '{name}': leave it out")
        samples = outcome["n-samples"].values()
        return {
            "metrics": metrics,
            "examples": sum(sample["effective"] for sample in samples),
            "limit": self.limit,
        }
