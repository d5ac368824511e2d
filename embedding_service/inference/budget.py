"""How many padded tokens a batch should hold."""


class BatchBudget:
    """`tokens` is what a batch should hold; padding of `overhead_tokens` costs what another batch would."""

    def __init__(self, tokens: int, overhead_tokens: int) -> None:
        self.tokens = tokens
        self.overhead_tokens = overhead_tokens

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn that a batch of so many padded tokens took this long."""
