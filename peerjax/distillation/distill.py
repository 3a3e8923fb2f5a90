"""Trains a student towards its teacher, and reports what the student lost."""

from __future__ import annotations

import json
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from peerjax.atomic import write_atomically
from peerjax.config import OWN
from peerjax.data.pipeline import Corpus
from peerjax.distillation import report
from peerjax.distillation.cache import Cache, CachedTeacher, Contents
from peerjax.distillation.comparison import compare, summary
from peerjax.distillation.starts import Conversion
from peerjax.distillation.student import check_text, student_config, weights_of
from peerjax.evaluation import ALL
from peerjax.inference.trained import Run, open_run, restore
from peerjax.model import Decoder
from peerjax.objectives import Task, language_model
from peerjax.objectives.distillation import LiveTeacher, Teacher, towards
from peerjax.processes import is_first, share
from peerjax.sharding import mesh_for
from peerjax.training.loop import train
from peerjax.training.report import is_of
from peerjax.training.workdir import folder_of, workdir_and_step

# Rows of each domain on which the report compares the models.
ROWS = 256


def distill(
    recipe: ml_collections.ConfigDict, workdir: str, teacher: str, cache: str | None = None
) -> None:
    """Trains a student, or continues from the newest checkpoint in `workdir`, and reports.

    Several processes can run it together, as they can run `train`.

    Args:
        recipe: configuration of the student, as `student_config` takes it.
        workdir: folder of the student's run. Beside the files of `train`, it gets `starts.json` and
            `distillation.json`.
        teacher: workdir of the teacher, or one of its checkpoints.
        cache: folder with the teacher's predictions, which is made or completed first. By default,
            the teacher runs at every step.

    Raises:
        UserError: a subclass of it, with one sentence that names the problem and the remedy.
    """
    folder, step = workdir_and_step(teacher)
    run = open_run(str(folder), step)
    config = student_config(recipe, run, teacher, cached=cache is not None)
    student = Student(run, folder_of(workdir), None if cache is None else epath.Path(cache))
    train(config, workdir, student.task)
    share("the run has ended")  # process 0 has written its report
    if is_of(student.folder, config.steps):
        student.report(config)


class Student:
    """The task of a student, and its report.

    Args:
        teacher: the teacher.
        folder: folder of the student's run.
        cache: folder of the cache, or `None`.
    """

    def __init__(self, teacher: Run, folder: epath.Path, cache: epath.Path | None):
        self.folder = folder
        self._teacher, self._cache = teacher, cache
        self._corpus: Corpus | None = None

    def task(self, config: ml_collections.ConfigDict, corpus: Corpus) -> Task:
        """Returns the task. With a cache, its missing files are made first."""
        check_text(self._teacher, corpus)
        self._corpus = corpus
        weights, mesh = weights_of(config), mesh_for(config)
        source: Teacher
        if self._cache is None:
            source = LiveTeacher(self._teacher.model, restore(self._teacher, mesh))
        else:
            contents = Contents.of(config, self._teacher, corpus, weights)
            cached = Cache(self._cache, contents, config, corpus.train)
            if cached.missing():
                with jax.set_mesh(mesh):
                    variables = restore(self._teacher, mesh)
                    size = config.data.batch_size
                    cached.fill(self._teacher.model, variables, corpus.train, mesh, size)
            source = CachedTeacher(cached)
        task = towards(
            language_model(config, corpus.tokenizer.vocab_size), source, weights, config.steps
        )
        if config.distill.start == OWN:
            return task
        return task._replace(start=lambda mesh: self._start(config, corpus, task, mesh))

    def _start(
        self, config: ml_collections.ConfigDict, corpus: Corpus, task: Task, mesh: Mesh
    ) -> dict[str, Any]:
        """Returns the first weights, and writes the loss of every stage of the conversion."""
        student = task.model
        variables = task.frozen or restore(self._teacher, mesh)  # a cached teacher is not there
        given = Conversion(config, self._teacher.model, variables, student, corpus.train, mesh)
        record, chosen = [], {}
        for stage in given.stages():
            texts = self._compare(config, corpus, variables, stage.model, stage.variables, mesh)
            record.append({"title": stage.title, "texts": texts, **stage.facts})
            of_all = texts[ALL]
            if is_first():
                print(
                    f"{stage.title}: {of_all['student']:.4f} nats/token, {of_all['gap']:+.4f} from "
                    f"the teacher, KL {of_all['divergence']:.4f}",
                    flush=True,
                )
            if stage.is_start:
                chosen = stage.variables
        if is_first():
            write_atomically(self.folder / report.STARTS, json.dumps(record, indent=1))
        return chosen

    def _compare(
        self,
        config: ml_collections.ConfigDict,
        corpus: Corpus,
        of_teacher: dict[str, Any],
        student: Decoder,
        of_student: dict[str, Any],
        mesh: Mesh,
    ) -> dict[str, dict[str, float]]:
        """Compares a model with the teacher on validation text."""
        return summary(
            compare(
                (self._teacher.model, of_teacher),
                (student, of_student),
                corpus.validation,
                mesh,
                rows=ROWS,
                batch_size=config.data.batch_size,
            )
        )

    def report(self, config: ml_collections.ConfigDict) -> None:
        """Compares the finished student with its teacher, writes the report and prints it."""
        assert self._corpus is not None
        is_written = report.is_written(self.folder, config.steps)
        share("the report is looked for")  # before process 0 writes it
        if not is_written:
            student, mesh = open_run(str(self.folder)), mesh_for(config)
            with jax.set_mesh(mesh):
                one, other = (restore(each, mesh) for each in (self._teacher, student))
                texts = self._compare(config, self._corpus, one, student.model, other, mesh)
            if is_first():
                report.write(self.folder, config, texts, one, other)
        if is_first():
            report.print_report(self.folder)
