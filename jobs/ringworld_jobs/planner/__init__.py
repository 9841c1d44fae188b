"""What a job will take and cost before it starts: memory, time, money; and what makes it fit."""
