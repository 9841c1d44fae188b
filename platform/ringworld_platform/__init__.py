"""Who runs where: command line, controller, gangs, tracking."""
