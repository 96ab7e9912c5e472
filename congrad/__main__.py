"""`python -m congrad`."""

from congrad import main

if __name__ == "__main__":
    main()
