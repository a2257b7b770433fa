"""`python -m convert` is the command `fairseq-to-hf`."""

from convert.cli import main

if __name__ == "__main__":
    main(prog_name="fairseq-to-hf")
