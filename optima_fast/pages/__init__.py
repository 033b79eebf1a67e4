"""Pages of HTML that hold everything themselves: what the report and the demo write.

``html`` is the frame, ``records`` reads runs and puts those of one method together, ``plots``
draws, ``figures`` says what is drawn, ``examples`` asks the models, ``report`` writes the page.
"""
