"""Stages 5 and 6: the transformer learns pictures and captions, then guidance is distilled into the guidance embedding."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from lorabooth import flow
from lorabooth.mini import MAX_SEQUENCE_LENGTH, world
from scripts.mini import draw
from scripts.mini.common import Training, autocast, compute, device
from scripts.mini.text import WIDTH, said_attributes, sentence, tokens
from scripts.mini.vae import to_tensor

BATCH = 64
TOKEN_PX = 16
"""Side of the square of picture that one image token holds: 8x by the VAE, 2 x 2 by packing."""
GUIDANCE_RANGE = (1.0, 5.0)
"""Guidance values the distilled model answers to; 3.5, the pipeline's default, lies well inside."""
CFG_PER_GUIDANCE = 0.6
"""Classifier-free guidance of scale 1 + 0.6 * (g - 1) is folded into guidance g, 2.5 into 3.5: what a caption leaves open
is little here, so a scale over 3 gains nothing, and the further from 1, the harder it is to learn."""


def new_transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's architecture at width 224: 2 double and 4 single blocks, 7 heads of 32."""
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=7,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """Encoded captions: embeds [B, L, WIDTH] from T5, pooled [B, WIDTH] from CLIP."""

    embeds: Tensor
    pooled: Tensor


def predict(transformer: FluxTransformer2DModel, x: Tensor, ids: Tensor, sigma: Tensor, guidance: Tensor, condition: Condition) -> Tensor:
    """x [B, N, 64], ids [N, 3], sigma [B], guidance [B] -> velocity [B, N, 64]."""
    return transformer(
        hidden_states=x, timestep=sigma, guidance=guidance, pooled_projections=condition.pooled, encoder_hidden_states=condition.embeds,
        txt_ids=flow.text_ids(condition.embeds.shape[1], x.device), img_ids=ids, return_dict=False,
    )[0]  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """x_0 [B, N, 64], ids [N, 3], loss weights [N, 1] of mean 1, captions, which of them say everything [B], and the T5
    length to pad them to."""

    x_0: Tensor
    ids: Tensor
    weights: Tensor
    texts: list[str]
    whole: Tensor
    length: int

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, weighted by token (`draw.importance`)."""
        return (self.weights * (predicted.float() - target).square()).mean()


@dataclass
class Data:
    """Latents by picture size, the people they show, the loss weights of their tokens, and the frozen text encoders."""

    latents: dict[tuple[int, int], Tensor]
    people: dict[tuple[int, int], list[world.Person]]
    weights: dict[tuple[int, int], Tensor]
    clip: CLIPTokenizer
    t5: T5Tokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel

    @torch.no_grad()
    def encode(self, texts: list[str], length: int) -> Condition:
        """Captions -> conditioning, padded to `length` T5 tokens."""
        clip, t5 = tokens(self.clip, self.t5, texts, length)
        return Condition(self.text_encoder_2(t5)[0], self.text_encoder(clip).pooler_output)

    def batch(self, rng: random.Random, unsaid: float) -> Batch:
        """A batch of one picture size; a share `unsaid` of its captions is empty."""
        size = (128, 128) if rng.random() < 0.75 else rng.choice(list(self.latents))
        # FLUX has no text mask, so padding is seen; some longer padding keeps the model calm where a caller pads to 512.
        length = rng.choices((MAX_SEQUENCE_LENGTH, 128, 512), (92, 6, 2))[0]
        count = BATCH * MAX_SEQUENCE_LENGTH // length if length > 128 else BATCH
        picks = [rng.randrange(len(self.people[size])) for _ in range(count)]
        said = [None if rng.random() < unsaid else said_attributes(rng) for _ in picks]
        texts = ["" if names is None else sentence(self.people[size][i], names, rng) for i, names in zip(picks, said, strict=True)]
        whole = torch.tensor([names is not None and len(names) == len(world.ATTRIBUTES) for names in said], device=device())
        latents = self.latents[size][picks].to(device()).float()
        ids = flow.image_ids(latents.shape[2], latents.shape[3], device=device())
        return Batch(flow.pack(latents), ids, self.weights[size].to(device()), texts, whole, length)


@torch.no_grad()
def load_data(work: Path, out: Path) -> Data:
    """Encode every drawing once (posterior means, scaled), in half precision; kept in a file for the next start."""
    vae = AutoencoderKL.from_pretrained(out / "vae").to(device()).eval()
    latents, people, weights = {}, {}, {}
    for size in world.SIZES_PX:
        weights[size] = F.avg_pool2d(torch.from_numpy(draw.importance(size))[None], TOKEN_PX).reshape(-1, 1)
        file = work / f"latents-{size[0]}x{size[1]}.pt"
        pictures, people[size] = draw.load(work / "drawings", size)
        if not file.exists():
            rows = []
            for i in tqdm(range(0, len(pictures), 64), desc=f"latents {size[0]}x{size[1]}", mininterval=5):
                with autocast():
                    mean = vae.encode(to_tensor(pictures[i : i + 64])).latent_dist.mean
                rows.append(((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
            torch.save(torch.cat(rows), file)
        latents[size] = torch.load(file, weights_only=True)
    encoders = CLIPTextModel.from_pretrained(out / "text_encoder"), T5EncoderModel.from_pretrained(out / "text_encoder_2")
    for encoder in encoders:
        encoder.to(device()).eval().requires_grad_(False)
    return Data(latents, people, weights, CLIPTokenizer.from_pretrained(out / "tokenizer"), T5Tokenizer.from_pretrained(out / "tokenizer_2"), *encoders)


def noised(x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma [B] (logit-normal, leaning to much noise), x_sigma, velocity target.

    What a caption decides, it decides at sigma over 0.8; the standard logit-normal draws only 1.4 % over 0.9, this one 9 %.
    """
    sigma = flow.logit_normal(len(x_0), mean=0.7, std=1.2).to(x_0.device)
    noise = torch.randn_like(x_0)
    return sigma, flow.add_noise(x_0, noise, sigma), flow.velocity(x_0, noise)


def train(work: Path, out: Path, steps: int, picture_steps: int, seed: int) -> None:
    """Stage 5: `picture_steps` of pictures without words, then captions to pictures; all at guidance 1."""
    data = load_data(work, out)
    torch.manual_seed(seed)
    transformer = new_transformer().to(device())
    training = Training(transformer, work / "base.safetensors", peak=2e-3, steps=steps, orthogonal=True)

    def loss(rng: random.Random) -> Tensor:
        batch = data.batch(rng, unsaid=0.1 if training.step >= picture_steps else 1.0)
        sigma, x, target = noised(batch.x_0)
        with compute():
            predicted = predict(transformer, x, batch.ids, sigma, torch.ones_like(sigma), data.encode(batch.texts, batch.length))
        return batch.loss(predicted, target)

    loop(training, loss, f"{seed}/base", "base")


def distill(work: Path, out: Path, steps: int, seed: int) -> None:
    """Stage 6: classifier-free guidance folded into the guidance embedding (Meng et al. 2023, arXiv 2210.03142), so
    that one forward a step is enough.

    Target = known + (scale - 1) * (teacher(caption) - teacher(nothing)). `known` is teacher(caption), for the data's own
    velocity is mostly noise to the student; only where a caption says everything, so that it determines the drawing, and
    the noise still hides that drawing, it is the data's own velocity, which has none of the teacher's errors (as in Tang et al. 2025,
    arXiv 2502.12154).
    """
    data = load_data(work, out)
    transformer = new_transformer().to(device())
    Training(transformer, work / "base.safetensors", peak=0, steps=1, orthogonal=True).load_ema()
    teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
    training = Training(transformer, work / "distill.safetensors", peak=1e-3, steps=steps, orthogonal=True)

    def loss(rng: random.Random) -> Tensor:
        batch = data.batch(rng, unsaid=0.02)
        sigma, x, velocity = noised(batch.x_0)
        low, high = GUIDANCE_RANGE
        one = torch.ones_like(sigma)
        guidance = torch.where(torch.rand_like(sigma) < 0.2, one, torch.rand_like(sigma) * (high - low) + low)
        with compute():
            said = data.encode(batch.texts, batch.length)
            with torch.no_grad():
                nothing = data.encode([""] * len(batch.texts), batch.length)
                without, given = (predict(teacher, x, batch.ids, sigma, one, condition).float() for condition in (nothing, said))
            predicted = predict(transformer, x, batch.ids, sigma, guidance, said)
        certain = (batch.whole & (sigma > 0.5)).view(-1, 1, 1)
        known = torch.where(certain, velocity, given)
        beyond = CFG_PER_GUIDANCE * (guidance - 1).view(-1, 1, 1)
        return batch.loss(predicted, known + beyond * (given - without))

    loop(training, loss, f"{seed}/distill", "distill")


def loop(training: Training, loss_of: Callable[[random.Random], Tensor], seed: str, name: str) -> None:
    """Run a stage to its last step, with progress, saving now and then; randomness depends on the seed and the step."""
    bar = tqdm(range(training.step, training.steps), initial=training.step, total=training.steps, desc=name, mininterval=5)
    running = 0.0
    for step in bar:
        rng = random.Random(f"{seed}/{step}")
        torch.manual_seed(rng.getrandbits(63))
        loss = loss_of(rng)
        training.update(loss)
        running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
        if training.step % 250 == 0:
            training.save()
    training.save()
