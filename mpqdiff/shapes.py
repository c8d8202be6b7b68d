"""The dimension letters used in every signature, and the array aliases built on them.

B batch, H W C image, P tokens, D features, N calibration samples, F timesteps of the full
(training) schedule, T recorded timesteps, S kept sampler steps, L sites, K bit choices per
site, R resources, G groups of timesteps.
"""

from jaxtyping import Array, Float, Int

Images = Float[Array, "B H W C"]
Labels = Int[Array, "B"]
Timestep = Int[Array, ""] | Int[Array, "B"]  # integer index, 0 is the clean end
