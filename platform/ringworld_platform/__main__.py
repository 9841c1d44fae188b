"""``python -m ringworld_platform``: the `ringworld` command where only the packages are there."""

from ringworld_platform.cli import main

main()
