"""XLA's own gather and scatter, image by image."""

import jax


def gather_rows(x, index, *, ordered, unique):
    """See the package; the indices are in range."""

    def one(x, index):
        return x.at[index].get(
            mode="promise_in_bounds", indices_are_sorted=ordered, unique_indices=unique
        )

    return jax.vmap(one)(x, index)


def scatter_rows(into, index, rows, *, add, ordered, unique):
    """See the package."""

    def one(into, index, rows):
        at = into.at[index]
        options = {
            "mode": "drop",
            "indices_are_sorted": ordered,
            "unique_indices": unique,
            "wrap_negative_indices": False,
        }
        return at.add(rows, **options) if add else at.set(rows, **options)

    return jax.vmap(one)(into, index, rows)
