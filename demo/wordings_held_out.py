"""The half that training never sees: other names, things, sentences, and layouts with their parts in another order."""

from __future__ import annotations

from .material import Material, lines, words

HELD_OUT = Material(
  first=words("""Agnes Albert Astrid Boris Cecilia Dora Edgar Esther Gloria Greta Hugo Ingrid Ivan Jasmine Kofi Liam Magnus Nora Olga
    Pablo Priya Quentin Ravi Stella Tobias Ursula Vera Walter Xavier Zoe"""),
  last=words("""Abbott Andersen Bauer Bishop Campbell Dalton Duarte Ferrari Fraser Grant Haas Huang Jacobs Kaya Larsen Lindgren Mendez
    Murphy Nakamura Okafor Olsen Petrov Quinn Ramos Santos Sharma Vargas Weber Wong Zimmerman"""),
  items=(
    "accordion", "bean bag", "cuckoo clock", "dartboard", "egg timer", "fondue set", "hot water bottle", "inflatable flamingo",
    "leaf blower", "mosquito net", "pepper mill", "piggy bank", "popcorn machine", "rowing machine", "salad spinner", "scarecrow",
    "skateboard", "snow globe", "trampoline", "trombone", "typewriter", "watering can", "weather vane", "wind chime",
  ),
  hello=lines("""
    Hey folks,
    Hey you lovely people!
    Dear customer service,
    Good afternoon,
    To whom it may concern,"""),
  bye=lines("""
    Warm wishes,
    Yours truly,
    With thanks,
    Take care,
    Respectfully,"""),
  chat=lines("""
    My parrot repeats my curses.
    I've shopped with you since 1998.
    The whole village knows by now.
    I'm typing this with 1 thumb.
    My therapist, Dr. Lund, suggested this mail.
    We've got 14 guests tonight.
    It's my 3rd attempt to reach you."""),
  layouts=(
    "{chat} The name is {name}, the order {order}. {ask}",
    "Case {order}\nSender: {name}\n{ask}\n{bye}",
    "{hello} {name} speaking about purchase {order}. {ask}",
    "{ask}\n\n{name}\nMy number: {order}",
    "{order}; {name}; {ask} {chat}",
    "{hello}\n{ask}\n{bye}\n{name}\nP.S. It's number {order}.",
    "{ask} Reply to {name}, please, on {order}. {bye}",
  ),
  ask=dict(
    refund=lines("""
      I'd like 30 euros back. The {item} fell apart.
      This {item} is broken, so please refund me.
      We returned the {item} in May and saw no money since.
      I'm asking for a refund, as the {item} has mould.
      The {item} didn't work for a minute. Pay me back!
      Kindly reimburse us for a {item} without a lid.
      You've charged my card three times for the {item}. I want two of them refunded.
      Our {item} exploded. We'd like all of our money back.
      Such a poor {item}! Where can I ask for repayment?
      The {item} isn't what you advertised; transfer my money back.
      My {item} sank. Would you please credit my card?
      Give back what I paid, the {item} bit me."""),
    delivery=lines("""
      Where's our {item}? It's been 10 days.
      The {item} I ordered hasn't come.
      Can you find out where my {item} is stuck?
      When does the {item} reach us?
      Still no {item} on my doorstep.
      Your courier drove past, and I've no {item}.
      I'd love to know when to expect my {item}.
      Did my {item} get lost on the road?
      The {item} was to arrive yesterday. Who has it?
      Do you have a tracking link for our {item}?
      It's Christmas soon: does the {item} come in time?
      The parcel with our {item} seems to be travelling in circles."""),
    cancel=lines("""
      Cancel my {item}, please.
      We'd rather not have the {item}; stop it before it ships.
      I bought this {item} by accident. Can I cancel?
      Scrap our {item} order, grandma already knitted one.
      I've decided that I don't need a {item}. Please call the order off.
      No {item} for us after all, so don't send any.
      My doctor forbids the {item}. I must cancel.
      Please withdraw the {item} order, we've run out of space.
      Is it possible to stop the {item} order? My wife said no.
      Our plans changed. Kindly take that {item} off the order.
      I was joking about the {item}. Undo my order, please.
      Do cancel our order, the {item} won't fit in the lift."""),
    invoice=lines("""
      Can you e-mail an invoice for our {item}?
      We need a bill showing the {item} for our tax return.
      The receipt for my {item} was eaten by the dog. Another copy?
      Where's the invoice? The box held a {item} and nothing else.
      My company pays for this {item} once it has a bill.
      Please send a receipt to go with the {item}.
      The invoice says two, but I bought one {item}. Please correct it.
      I'd need a VAT receipt: it's for one {item}.
      Could our accountant have the invoice of that {item}?
      My {item} invoice has a spelling mistake.
      A paper bill would help, my printer is dead. It's about the {item}.
      Insurance wants a receipt proving that the {item} was mine."""),
  ),
)
