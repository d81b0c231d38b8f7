"""Stage: caches -> LoRA weights. Loads the transformer only (and, for a moment at each preview, the VAE)."""

import hashlib
import math
import random
import sys
from pathlib import Path
from traceback import clear_frames
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from lorabooth import __version__
from lorabooth.attention import choose_kernel
from lorabooth.checkpoints import folders, start_of
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, compute_device, forget_pinned
from lorabooth.errors import UserError, out_of_memory
from lorabooth.families import load_family
from lorabooth.families.flux1 import GUIDANCE_IN_TRAINING, Flux1
from lorabooth.lora import LoraSpec, tensors
from lorabooth.notes import note
from lorabooth.photos import Manifest
from lorabooth.runs import RunDir, write_durable
from lorabooth.sizes import GB
from train import optimizers
from train.base import pinned
from train.checkpoint import TrainState, drop_old, load_checkpoint, save_checkpoint, saved_step, verified
from train.compiled import compile_blocks
from train.data import Batch, Cache, Sampler, class_items, class_photos, items, stem
from train.lean_blocks import lean
from train.objective import drawn, loss_of
from train.placement import place, shard, start_plan
from train.plan import WINDOW, MemoryPlan, next_lighter, wanted
from train.planning import plans_for, plans_to_go_on
from train.preview import picture_files, preview
from train.several import batch_note, check_same_end, check_same_run, check_same_start, end_all, locked
from train.stopping import Agreement, stop_requests
from train.trackers import ending_trackers, log_figures, start_trackers
from train.trainer import Trainer, backward
from train.validation import measure

LOG_EVERY = 10


def run(run_dir: RunDir) -> None:
    """Train to the last step, from the newest checkpoint if there is one."""
    done = finished(run_dir)
    check_same_end(done)
    if not done:
        _train(run_dir)
        return
    drop_old(run_dir)  # where a kill came between the last checkpoint and this
    if not run_dir.lora.exists() and any(_missing(run_dir, run_dir.config.steps)):  # an interruption came between the last checkpoint and these
        try:
            _train(run_dir)
        except (UserError, OSError) as error:  # the LoRA is trained all the same
            note(f"what was to be seen after the last step is missing: {error.message if isinstance(error, UserError) else error}")


def _train(run_dir: RunDir) -> None:
    config = run_dir.config
    device = compute_device()
    family = load_family(config.model)
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=list(config.tracker_names) or None, project_dir=run_dir.path / "tensorboard")
    with locked(run_dir, accelerator):
        check_same_run(run_dir, accelerator)
        estimates = plans_to_go_on(run_dir, family, device, shards_of(accelerator))
        if accelerator.num_processes > 1:  # GPUs may differ: all take the plan of the smallest
            estimates = min(gather_object([estimates]), key=lambda found: found[0].bytes)
        plan = estimates[0].plan
        if device.type == "cuda":
            kernel, best = choose_kernel(max(config.resolutions_px), family, device), estimates[0]
            if accelerator.is_main_process:
                print(f"plan: {plan}; about {best.bytes / GB:.1f} GB of GPU memory, {best.seconds:.2f} s a step; attention by {kernel}", file=sys.stderr)
        with ending_trackers(accelerator):
            while not _trained(run_dir, family, accelerator, plan):
                lighter = next_lighter(plan, estimates)
                if lighter is None or not config.auto_retry or accelerator.num_processes > 1:
                    step = saved_step(run_dir)
                    raise UserError(
                        f"the GPU's memory ran out with this plan: {plan}; {f'the run is saved at step {step}' if step else 'nothing was trained yet'}",
                        hint=f"go on with these settings: {lighter}" if lighter else "start a new run with a lower --resolution or --batch-size",
                    )
                note(f"the GPU's memory ran out; going on from the last step with: {lighter}")
                plan = lighter


def _trained(run_dir: RunDir, family: Flux1, accelerator: Accelerator, plan: MemoryPlan) -> bool:
    """Train with a plan to the last step, from the newest checkpoint; False where the GPU's memory ran out, and then the state is saved."""
    trainer = None
    try:
        trainer = start(run_dir, run_dir.config, family, accelerator, plan)
        load_checkpoint(run_dir, trainer.state)
        check_same_start(trainer.state, accelerator)
        trainer.show_weights()
        if accelerator.is_main_process:
            for line in batch_note(run_dir, trainer.state.step, accelerator.num_processes):
                note(line)
            device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "CPU"
            made_by = {"device": device, "torch": torch.__version__, "lorabooth": __version__}
            run_dir.log(event="plan", step=trainer.state.step, plan=str(plan), processes=accelerator.num_processes, **made_by)
            start_trackers(accelerator, run_dir, trainer.state.step)
        if wanted(run_dir.config.compile_blocks, plan, accelerator.device, run_dir.config.steps - trainer.state.step):
            compile_blocks(trainer)
        _loop(trainer)
        return True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # they hold the step's activations, and to save takes a little room
        if trainer and trainer.state.step:  # whichever process it is: after a whole step the weights are the same in all
            save_checkpoint(run_dir, trainer.state)
        return False
    finally:
        del trainer
        accelerator.free_memory()
        forget_pinned()


def finished(run_dir: RunDir) -> bool:
    """Whether the last step is already in a checkpoint that is whole."""
    return verified(checkpoint_of(run_dir)) is not None


def checkpoint_of(run_dir: RunDir) -> Path:
    """The folder of the last step's checkpoint."""
    return run_dir.checkpoints / f"step-{run_dir.config.steps:06d}"


def start(run_dir: RunDir, config: TrainConfig, family: Flux1, accelerator: Accelerator, plan: MemoryPlan | None = None) -> Trainer:
    """Load the transformer as the plan says (the fastest that fits, unless given), put the LoRA and the optimiser on it."""
    device, dtype = accelerator.device, base_dtype(accelerator.device)
    plan = plan or plans_for(config, family, device, shards_of(accelerator))[0].plan
    transformer = family.transformer(torch.device("cpu") if plan.in_parts else device, dtype)
    if accelerator.is_main_process:
        pinned(run_dir, "transformer")
    modulation = place(transformer, plan, device)
    live = attach(run_dir, config, transformer)
    text_encoder = family.clip(device, dtype) if config.train_text_encoder else None
    live += LoraSpec.of(config).attach_clip(text_encoder, config.seed) if text_encoder else []
    trained = [transformer, *([text_encoder] if text_encoder else [])]
    components = zip(("transformer", "text_encoder"), trained, strict=False)
    names = [f"{component}.{name}" for component, module in components for name, p in module.named_parameters() if p.requires_grad]
    for p in live:  # those of blocks in host memory, too
        p.data = p.data.to(device)
    parameters = live if dtype == torch.float32 else [p.detach().clone() for p in live]
    for p in live:
        p.data = p.data.to(dtype)
    if not (config.lora_dropout or config.use_dora):
        for module in trained:
            lean(module, remake=device.type != "cpu")
    if plan.shards > 1:
        shard(transformer)
    start_plan(transformer, plan, device, random=config.lora_dropout > 0)
    for module in trained:
        module.train()
    name = optimizers.chosen(config, device)
    ema = [p.detach().clone() for p in parameters]
    untrained = [p.detach().clone() for p in live] if config.preservation_rate else []
    state = TrainState(0, parameters, ema, optimizers.build(name, dict(zip(names, parameters, strict=True)), config), name, plan.precision)
    # A step takes one batch from the sampler, and each process its part of it.
    size = config.batch_size * accelerator.num_processes
    sampler, prior = Sampler(items(Manifest.load(run_dir.path), config), size, config.seed), class_items(run_dir, config)
    others = Sampler(prior, size, config.seed) if prior else None
    cache = Cache(run_dir)
    return Trainer(run_dir, config, family, accelerator, plan, transformer, live, state, untrained, sampler, others, cache, modulation, text_encoder)


def shards_of(accelerator: Accelerator) -> int:
    """How many processes divide the base among them: all where accelerate's config asks for FSDP, else each has the whole."""
    return accelerator.num_processes if parse_flag_from_env("ACCELERATE_USE_FSDP") else 1


def attach(run_dir: RunDir, config: TrainConfig, transformer: torch.nn.Module) -> list[Tensor]:
    """Put the recipe's LoRA on the transformer; where its start is taken out of the base, that start is kept for a resume and the export."""
    spec = LoraSpec.of(config)
    if config.lora_init != "pissa":
        return spec.attach(transformer, config.seed)
    if run_dir.lora_start.exists() or folders(run_dir):
        return spec.attach(transformer, config.seed, start_of(run_dir))
    parameters = spec.attach(transformer, config.seed)
    run_dir.check_there()
    write_durable(run_dir.lora_start, save({name: t.float().contiguous().cpu() for name, t in tensors(transformer).items()}))
    return parameters


def train_step(trainer: Trainer) -> tuple[Tensor, tuple[str, ...]]:
    """One optimiser step; the loss (on the device, not read back) and the photos it saw."""
    config, state, accelerator = trainer.config, trainer.state, trainer.accelerator
    parts = config.gradient_accumulation
    losses: list[Tensor] = []
    photos: list[str] = []
    for part in range(parts):
        index = state.step * parts + part
        _look_ahead(trainer, index)
        batch, generator = _batch(trainer, index)
        torch.manual_seed(generator.initial_seed() + accelerator.process_index)  # dropout draws from torch's own
        loss = loss_of(trainer, batch, generator) / parts
        backward(loss)
        trainer.collect_gradients()
        losses.append(loss.detach())
        photos += batch.photos
    trainer.average_gradients()
    torch.nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
    optimizers.set_rates(state.optimizer, config, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    trainer.show_weights()
    state.step += 1
    decay = min(config.ema_decay, state.step / (10 + state.step)) if config.ema_decay else 0.0
    torch._foreach_lerp_(state.ema, [p.detach() for p in state.parameters], 1 - decay)
    return torch.stack(losses).sum(), tuple(photos)


def _batch(trainer: Trainer, index: int) -> tuple[Batch, torch.Generator]:
    """This process's part of the batch with an index, and what draws its noise."""
    rng, generator = _randomness(trainer.config.seed, index)
    sampler = trainer.others if trainer.others and rng.random() < trainer.config.prior_rate else trainer.sampler
    return trainer.cache.batch(sampler.batch(index), trainer.config, rng, trainer.part), generator


def _look_ahead(trainer: Trainer, index: int) -> None:
    """Have the modulation of the next batches computed, where the plan does so. Windows begin at fixed places: a resumed run computes
    the same sums in the same company, so to the bit."""
    if not trainer.modulation or trainer.modulation.window == index // WINDOW:
        return
    first = index // WINDOW * WINDOW
    last = min(first + WINDOW, trainer.config.steps * trainer.config.gradient_accumulation)
    batches = [(batch, drawn(trainer, batch, generator)[1]) for batch, generator in (_batch(trainer, i) for i in range(first, last))]
    pooled = torch.cat([batch.conditioning.pooled for batch, _ in batches])
    trainer.modulation.expect(torch.cat([sigma for _, sigma in batches]), GUIDANCE_IN_TRAINING, pooled)
    trainer.modulation.window = index // WINDOW


def _randomness(seed: int, index: int) -> tuple[random.Random, torch.Generator]:
    """Generators of one batch: a function of the seed and the batch's index, so that nothing need be stored for a resume."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    number = int.from_bytes(digest[:7], "little")
    return random.Random(number), torch.Generator().manual_seed(number)


def _loop(trainer: Trainer) -> None:
    config, state, main = trainer.config, trainer.state, trainer.accelerator.is_main_process
    pending: list[tuple[int, Tensor, tuple[str, ...]]] = []
    average, alone = math.nan, trainer.accelerator.num_processes == 1
    looking = main or trainer.plan.shards > 1
    if looking:
        held_out, pictures = _due(config, 0)
        if state.step:  # the last session may have ended between its checkpoint and these
            held_out, pictures = _missing(trainer.run, state.step)
            if trainer.plan.shards > 1:  # all make them, or none
                held_out, pictures = gather_object([(held_out, pictures)])[0]
        if pictures:
            preview(trainer)
        if held_out:
            validate(trainer)
    bar = tqdm(total=config.steps, initial=state.step, desc="train", unit="step", disable=not main, smoothing=0.05)
    with bar, stop_requests() as stopped:
        agreement = Agreement(trainer.accelerator)
        while state.step < config.steps:
            try:
                loss, photos = train_step(trainer)
            except RuntimeError as error:
                if alone and out_of_memory(error):  # the others would not come along
                    _flush(trainer, [(step, loss.cpu(), photos) for step, loss, photos in pending], average)
                raise
            pending.append((state.step, loss, photos))
            bar.update()
            last, saving = state.step == config.steps, state.step % config.checkpoint_every == 0
            stopping = agreement.reached(bool(stopped))
            if last or saving or stopping or state.step % LOG_EVERY == 0:
                average = _flush(trainer, pending, average)
                bar.set_postfix({"loss": f"{average:.3f}"} | _memory(), refresh=False)  # a log file is not redrawn for it
                if main and (stopping or last or saving):
                    save_checkpoint(trainer.run, state)
                if stopping:
                    _interrupt(trainer)
            held_out, pictures = _due(config, state.step)
            if looking and held_out:
                validate(trainer)
            if looking and pictures:
                preview(trainer)
                if alone and stopped:  # the signal came during the preview
                    save_checkpoint(trainer.run, state)
                    _interrupt(trainer)


def _interrupt(trainer: Trainer) -> NoReturn:
    end_all(trainer.accelerator, KeyboardInterrupt(f"interrupted after step {trainer.state.step}, which is saved; run the same command again to go on"))


def _due(config: TrainConfig, step: int) -> tuple[bool, bool]:
    """Whether the loss of held-out photos, and previews, come after a step."""
    shown = bool(config.preview_every and config.preview_prompts)
    last = step == config.steps
    return bool(config.validation_photos) and (last or step % config.validation_every == 0), shown and (last or step % config.preview_every == 0)


def _missing(run_dir: RunDir, step: int) -> tuple[bool, bool]:
    """Which of these come after a step and are not there."""
    held_out, pictures = _due(run_dir.config, step)
    held_out = held_out and not any(row.get("event") == "validation" and row["step"] == step for row in run_dir.history())
    return held_out, pictures and not all(file.exists() for file in picture_files(run_dir, step))


def _memory() -> dict[str, str]:
    """The GPU memory at its peak, for the progress bar."""
    return {"GB": f"{torch.cuda.max_memory_reserved() / 1e9:.1f}"} if torch.cuda.is_available() else {}


def _flush(trainer: Trainer, pending: list[tuple[int, Tensor, tuple[str, ...]]], average: float) -> float:
    """Read the losses back (the only host sync of the loop) and log them; stops the run at a loss that is not finite."""
    losses = trainer.accelerator.reduce(torch.stack([loss for _, loss, _ in pending]), "mean").tolist() if pending else []
    for (step, _, photos), value in zip(pending, losses, strict=True):
        if not math.isfinite(value):
            names = {stem(photo): photo.original for photo in Manifest.load(trainer.run.path).photos}
            names |= {name: photo.original for name, photo in class_photos(trainer.run).items()}
            error = UserError(
                f"the loss became {value} at step {step} (photos {', '.join(names[p] for p in photos)}); training stopped, the last checkpoint is kept",
                hint="lower --learning-rate and start a new run, or look at those photos",
            )
            end_all(trainer.accelerator, error)
        average = value if math.isnan(average) else 0.95 * average + 0.05 * value
        if trainer.accelerator.is_main_process:
            trainer.run.log(step=step, loss=round(value, 6))
            log_figures(trainer.accelerator, step, {"loss": value})
    pending.clear()
    return average


def validate(trainer: Trainer) -> None:
    """Log the loss of the held-out photos."""
    loss = measure(trainer)
    if trainer.accelerator.is_main_process:
        trainer.run.log(event="validation", step=trainer.state.step, loss=round(loss, 6))
        log_figures(trainer.accelerator, trainer.state.step, {"validation_loss": loss})


def final_weights(run_dir: RunDir, raw: bool = False) -> list[Tensor]:
    """The averaged (or the raw) LoRA weights of the last checkpoint, in the parameters' order."""
    state = load_file(checkpoint_of(run_dir) / ("lora.safetensors" if raw else "ema.safetensors"))
    return [state[str(i)] for i in range(len(state))]
