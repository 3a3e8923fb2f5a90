"""The training loop, written to be read from top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import ml_collections
from etils import epath

from pallas_kernels import dispatch
from peerjax.atomic import alone_in, make_folder
from peerjax.config import implementation_of, validate
from peerjax.data.pipeline import Corpus, load_corpus, train_batches, validation_rows
from peerjax.errors import ConfigError
from peerjax.evaluation import ALL, Evaluation, evaluate, figures_of, probes_for
from peerjax.flops import forward_flops
from peerjax.model import Decoder
from peerjax.objectives import Task, language
from peerjax.pool import memory_report
from peerjax.processes import check_agreement, code_digest, is_first
from peerjax.routing.running import needs_first_batch
from peerjax.sharding import mesh_for, state_shardings
from peerjax.sharding.batches import put_batch
from peerjax.training import report
from peerjax.training.checkpoint import (
    Checkpoints,
    abstract,
    count_parameters,
    has_checkpoint,
    steps_in,
)
from peerjax.training.gradients import gradient_shapes
from peerjax.training.metrics import MetricsWriter, Progress
from peerjax.training.optimizer import make_optimizer, state_of_pools
from peerjax.training.pending import Pending, Warnings
from peerjax.training.preemption import StopSignals
from peerjax.training.start import Source, with_room
from peerjax.training.state import TrainState, create_state, state_of
from peerjax.training.step import make_train_step, set_by_first_batch
from peerjax.training.workdir import (
    check_config,
    check_data,
    folder_of,
    record,
    record_kernels,
)

MakeTask = Callable[[ml_collections.ConfigDict, Corpus], Task]


def train(config: ml_collections.ConfigDict, workdir: str, make_task: MakeTask = language) -> None:
    """Trains a model, or continues from the newest checkpoint in `workdir`.

    With several processes (`peerjax.processes`), every process calls this function with the same
    arguments. Process 0 writes the files of the run, except for checkpoints.

    Args:
        config: configuration of the run; see `peerjax.config`.
        workdir: folder of the run. Training writes `config.json`, `data.json`, `tokenizer.json`,
            `kernels.json`, `checkpoints/`, `metrics.jsonl` and `tensorboard/` there. At the end it
            writes `report.json` and plots.
        make_task: function that returns the training objective for a configuration and its text.

    Raises:
        UserError: a subclass of it, with one sentence that names the problem and the remedy.
    """
    # ---- Configuration, text and task ----
    folder = folder_of(workdir)
    validate(config)
    _refuse_unusable_kernels(config)
    check_config(folder, config)
    corpus = load_corpus(config)
    check_data(folder, corpus.identity)
    task, source = make_task(config, corpus), None
    if config.init_from and not has_checkpoint(folder):
        source = Source(config)
        source.check(task.model, corpus.tokenizer)
    check_agreement(
        {
            "the configuration": config.to_json_best_effort(sort_keys=True),
            "the text": json.dumps(corpus.identity),
            "the code": code_digest(),
            "the newest checkpoint": str(steps_in(folder)[-1:]),
        }
    )
    make_folder(folder)
    with alone_in(folder) if is_first() else contextlib.nullcontext():
        _train_in(folder, config, corpus, task, source)


def _train_in(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    corpus: Corpus,
    task: Task,
    source: Source | None,
) -> None:
    """Trains in a folder that no other process uses."""
    optimizer, mesh = make_optimizer(config), mesh_for(config)
    train_rows = task.of_rows(corpus.train)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopSignals())

        # ---- State: from the newest intact checkpoint, from another run, or fresh ----
        def fresh_state() -> TrainState:
            return create_state(config, task, optimizer)

        shapes = jax.eval_shape(fresh_state)
        shardings = state_shardings(mesh, shapes)
        checkpoints = stack.enter_context(Checkpoints(folder, config.checkpoint.keep))
        start = checkpoints.latest_step
        if start is not None and start >= config.steps and report.is_of(folder, start):
            if is_first():
                print(
                    f"the run in {folder} has finished its {start} steps; raise steps to continue"
                )
                report.print_report(folder)
            return
        if start is not None:
            state, next_batch = checkpoints.restore(start, abstract(shapes, shardings))
            batches = train_batches(config, train_rows, next_batch)
        elif source is not None:
            state, batches = source.state(task, optimizer, mesh), train_batches(config, train_rows)
        elif task.start is not None:
            first = task.start(mesh)
            first["pools"] = with_room(first["pools"], task.model)
            make_state = jax.jit(partial(state_of, optimizer=optimizer), out_shardings=shardings)
            state, batches = make_state(first), train_batches(config, train_rows)
        else:
            state = jax.jit(fresh_state, out_shardings=shardings)()
            batches = train_batches(config, train_rows)
            if needs_first_batch(shapes.stats):
                first = next(batches)
                batches = itertools.chain([first], batches)
                set_first = jax.jit(partial(set_by_first_batch, task), donate_argnums=0)
                state = set_first(state, put_batch(mesh, first))
        if is_first():
            record(folder, config, corpus.tokenizer, corpus.identity)
        kernels = dispatch.identity(implementation_of(config))
        kernels_before = record_kernels(folder, kernels) if is_first() else None

        # ---- Step, probes and output ----
        train_step = jax.jit(make_train_step(config, task, optimizer), donate_argnums=0)
        probes = probes_for(corpus.tokenizer)
        tokens_per_step = config.data.batch_size * config.data.sequence_length
        step = start or 0
        first_written = 0 if start is None else start + 1
        writer = stack.enter_context(MetricsWriter(folder, first_written))
        if shapes.pools and is_first():
            gradients = gradient_shapes(task, tokens_per_step)
            report.print_memory(
                memory_report(shapes.pools, state_of_pools(shapes.opt_state), gradients)
            )
        progress = Progress(config.steps, step, tokens_per_step, config.log_every)
        stack.enter_context(progress)
        progress.say(_describe(config, task.model, shapes, mesh, step))
        if shapes.pools:
            progress.say(dispatch.describe(implementation_of(config)))
        for line in report.describe_split(task.model.config):
            progress.say(line)
        if kernels_before not in (None, kernels):
            progress.say(
                f"until now {kernels_before} computed the run; {kernels} adds floats in another "
                "order, so results may differ in their last digits"
            )

        def evaluate_now() -> Evaluation:
            evaluation = evaluate(
                task.model,
                state.variables,
                corpus.validation,
                probes,
                mesh,
                rows=partial(validation_rows, count=config.eval.rows),
                batch_size=config.data.batch_size,
            )
            loss = evaluation[ALL]["loss"]
            progress.say(
                f"validation after {step} steps: {loss['nats_per_token']:.4f} nats/token, "
                f"{loss['bits_per_byte']:.4f} bits/byte"
            )
            return evaluation

        warnings = Warnings(config)

        def finish(pending: Pending) -> dict[str, float]:
            figures = pending.figures()
            for warning in warnings.about(pending, figures):
                progress.say(warning)
            progress.update(pending.step, figures)
            speed = {"tokens_per_second": progress.tokens_per_second}
            writer.write_events(pending.step, speed)
            return figures

        # ---- Steps ----
        if start is None:
            writer.write(0, figures_of(probes, evaluate_now()))
        pending: Pending | None = None
        while step < config.steps:
            batch = next(batches)
            state, metrics = train_step(state, put_batch(mesh, batch), task.frozen)
            step += 1
            # Metrics of the previous step are fetched while this step computes.
            if pending is not None:
                writer.write(pending.step, finish(pending))
            pending = Pending(step, metrics, batch["row"])

            ending = step == config.steps or stop.requested(step)
            evaluating = step % config.eval.every == 0 or step == config.steps
            saving = step % config.checkpoint.every == 0 or ending
            if evaluating or saving:
                # Metrics of a step are written before its checkpoint. While steps are skipped,
                # nothing is saved unless the run ends: it would replace a better checkpoint.
                figures, pending = finish(pending), None
                if evaluating:
                    evaluation = evaluate_now()
                    figures |= figures_of(probes, evaluation)
                writer.write(step, figures)
                saving = ending or (saving and not figures["skipped/in_a_row"])
            if saving:
                checkpoints.save(step, state, next_batch=step)
            if ending:
                break
        checkpoints.wait()
        if step == start:  # the run was killed between its last checkpoint and its report
            evaluation = evaluate_now()

    # ---- End ----
    if not is_first():
        return
    if step < config.steps:
        print(f"stopped and saved after step {step}; run the same command to continue")
    else:
        facts = {
            "steps": step,
            "tokens_per_step": tokens_per_step,
            "tokens_per_second": progress.tokens_per_second or None,
            "parameters": count_parameters(shapes.params),
            "expert_parameters": task.model.config.expert_parameters,
            "kernels": kernels,
            "checkpoint": checkpoints.path(step).relative_to(folder).as_posix(),
        }
        report.write_report(folder, evaluation, facts)
        report.print_report(folder)


def _refuse_unusable_kernels(config: ml_collections.ConfigDict) -> None:
    name = implementation_of(config)
    if name is not None and name != "xla" and (why := dispatch.cannot_run(name)):
        raise ConfigError(
            f"kernels.implementation={name} cannot be used: {why}; choose auto or xla instead"
        )


def _describe(
    config: ml_collections.ConfigDict,
    model: Decoder,
    shapes: Any,
    mesh: jax.sharding.Mesh,
    start: int,
) -> str:
    length, parameters = config.data.sequence_length, count_parameters(shapes.params)
    flops = sum(forward_flops(model.config, length).values())
    experts = model.config.expert_parameters
    devices = f"{mesh.size} {jax.devices()[0].platform} device{'s' if mesh.size > 1 else ''}"
    beginning = f"continuing from step {start}" if start else "starting"
    return (
        f"{parameters:,} parameters and {experts:,} in experts on {devices}, "
        f"{flops / 1e6:,.2f} MFLOPs a token forward, "
        f"{config.data.batch_size * length:,} tokens a step; {beginning}"
    )
