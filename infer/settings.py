"""`Settings`: how an engine is to run."""

from dataclasses import dataclass

from lorabooth.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How an engine is to run: precision and blocks in host memory where the plan is not to choose; batch: pictures at once;
    mixed: whether pictures with different LoRAs share a batch; fast: compiled blocks, and fp8 where the GPU multiplies it;
    cache: "balanced" or "max" leave out blocks whose result hardly changes from step to step, which loses detail;
    pixels: of the largest picture that is planned for, the model's native size where none is named."""

    precision: str = "auto"
    swapped: int | None = None
    batch: int = 1
    mixed: bool = False
    fast: bool = False
    cache: str = "off"
    pixels: int | None = None

    def __post_init__(self) -> None:
        if self.cache != "off" and (self.batch > 1 or self.mixed):
            raise UserError("a cache of steps and batches exclude each other: it would look at all pictures of a batch together", hint="leave out one of them")


DEFAULT = Settings()
