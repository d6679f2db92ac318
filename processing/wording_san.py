"""What other libraries' errors come down to in a message of our own."""


def first_line(error: BaseException) -> str:
    """
    The first line of an error without its full stop; the error's type where it says nothing.

    Args:
        error: of any kind.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


__all__ = ["first_line"]
