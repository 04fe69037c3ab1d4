"""What the benchmarks of the detector have in common."""

from dataclasses import dataclass
from typing import Any, Literal

from ghm_jax.config import Config, Data, Model


@dataclass(frozen=True, kw_only=True)
class DetectorCase:
    """A detector to time."""

    backbone: str = "resnet50"
    padded_size: tuple[int, int] = (800, 1344)
    """(height, width) of the padded images in pixels, multiples of 32."""
    num_classes: int = 80
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    channels: int = 256
    """Of pyramid and heads."""

    def config_with(self, **sections: Any) -> Config:
        """The config of the detector for this image size, with other sections as given."""
        return Config(
            data=Data(
                short_side=min(self.padded_size),
                long_side=max(self.padded_size),
                buckets=(self.padded_size,),
            ),
            model=Model(backbone=self.backbone, channels=self.channels, dtype=self.dtype),
            **sections,
        )
