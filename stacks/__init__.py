"""What Pulumi makes: programs and components. The only room that imports pulumi."""
