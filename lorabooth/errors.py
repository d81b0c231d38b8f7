"""What a user sees instead of a traceback."""


class UserError(Exception):
    """A problem the user can solve. `message` says what is wrong and the limit, `hint` how to go on.

    The command line prints both on standard error and exits with code 2; the server answers 4xx.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message
