"""The one exception that means "the input cannot be used"; the command line exits with 2 on it."""


class InputError(ValueError):
    """Unusable input. The message says what was got, what was expected and what to do."""


def unknown_name(kind: str, name: str, known) -> InputError:
    """The error for a name that a registry does not hold; lists the names it does."""
    return InputError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")


class InfeasibleError(InputError):
    """No allocation fits the budgets: a larger budget, or fewer steps, may."""


class VerificationError(RuntimeError):
    """What ran is not what the plan says; the message names each site and figure."""
