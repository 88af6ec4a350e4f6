"""What the command prints is the command's own: no loading bars and advice from the libraries below it."""


def quiet_libraries() -> None:
    """Only errors from diffusers and transformers; downloads keep their progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
