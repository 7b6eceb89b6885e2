"""The console command ``timm-eps``: one file for each verb."""
