"""What did each build change?"""
