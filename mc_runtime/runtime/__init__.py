"""A request's life: prompt to plan, plan to latents, latents to pictures."""
