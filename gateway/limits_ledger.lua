-- The ledger of one key's limits, in the store: gateway/policy/ledger.py says what it means, and is the same in Python.
-- KEYS[1]: the ledger. ARGV[1]: a report. Returns an answer. All three are MessagePack; structs are arrays.
local SLOTS, LIVES, FORGOTTEN, SETTLES, SCARCE = 60, 30, 600, 3, 10

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local process, number, batch, epoch, new_epoch, lost, limits = unpack(cmsgpack.unpack(ARGV[1]))
local ledger

local function new_ledger()
  return {epoch = new_epoch, created = now, settled_at = 0, processes = {}, used = {}}
end

local function keep_and_answer(settling, granted)
  local longest = 60
  for _, asked in ipairs(limits) do
    longest = math.max(longest, asked[3])
  end
  redis.call('SET', KEYS[1], cmsgpack.pack(ledger), 'EX', longest + math.ceil(longest / SLOTS) * 3 + FORGOTTEN)
  return cmsgpack.pack({now, ledger.epoch, settling, granted})
end

-- Of what was used in the window, by slot, what still counts, with the changes.
local function slots_of(name, seconds, changes)
  local slots, sum = {}, 0
  local present = math.floor(now / math.floor(seconds / SLOTS))
  local function add(slot, amount)
    slot = math.min(slot, present + 1)
    if slot >= present - SLOTS then
      slots[slot] = (slots[slot] or 0) + amount
      sum = sum + amount
    end
  end
  for slot, amount in pairs(ledger.used[name] or {}) do
    add(slot, amount)
  end
  for _, change in ipairs(changes) do
    add(change[1], change[2])
  end
  ledger.used[name] = slots
  return slots, math.max(0, sum)
end

-- Seconds until so much of what was used is forgotten, and until all of it is.
local function ends(slots, over, length)
  local numbers, wait, empty_in = {}, 0, 0
  for slot in pairs(slots) do
    numbers[#numbers + 1] = slot
  end
  table.sort(numbers)
  for _, slot in ipairs(numbers) do
    if slots[slot] > 0 then
      empty_in = math.max(0, (slot + SLOTS + 1) * length - now)
      if over > 0 then
        over = over - slots[slot]
        wait = empty_in
      end
    end
  end
  if over > 0 and #numbers > 0 then
    wait = (SLOTS + 1) * length
  end
  return wait, empty_in
end

local function grant(asked, me, changed, settling)
  local name, limit, seconds, held, keep, want, need, changes = unpack(asked)
  local mine = me.holds[name] or {free = 0, portion = 0, unmet = 0}
  me.holds[name] = mine
  mine.held, mine.want = held, want
  local holds, in_flight, wants = 0, 0, 0
  local others_hold, others_portions, others_lack = 0, 0, false
  for _, each in pairs(ledger.processes) do
    local hold = each.holds[name]
    if hold then
      holds, in_flight, wants = holds + 1, in_flight + hold.held, wants + hold.want
      if hold ~= mine then
        others_hold, others_portions = others_hold + hold.free, others_portions + hold.portion
        others_lack = others_lack or hold.unmet > 0
      end
    end
  end
  local slots, used = {}, in_flight
  if seconds > 0 then
    slots, used = slots_of(name, seconds, changed and changes or {})
  end
  local room, more = limit - used - keep - others_hold, 0
  if not settling then
    local fair = others_lack and 0 or math.floor(room * want / math.max(1, wants))
    more = math.max(0, math.min(room, math.max(want, need) - keep, math.max(need - keep, fair)))
  end
  mine.free = keep + more
  mine.unmet = math.max(0, need - mine.free)
  local left = math.max(0, room - more)
  local weight = (1 / holds + (want + 1) / (wants + holds)) / 2
  mine.portion = math.max(0, math.min(math.floor(left * weight), left - others_portions))
  local scarce = left * SCARCE < limit or others_lack or mine.unmet > 0
  local over = used + math.max(need, 1) - limit
  local wait, empty_in = ends(slots, over, seconds / SLOTS)
  return {more, mine.portion, used, wait, empty_in, scarce}
end

local function exchange()
  if epoch ~= ledger.epoch then
    if lost and now < ledger.created + SETTLES then
      ledger.settled_at = ledger.created + SETTLES
    end
    return keep_and_answer(true, {})
  end
  local me = ledger.processes[process] or {number = 0, batch = 0, holds = {}}
  if number <= me.number then
    return keep_and_answer(true, {})
  end
  local changed = batch > me.batch
  ledger.processes[process] = me
  me.number, me.batch, me.seen = number, math.max(batch, me.batch), now
  for name, each in pairs(ledger.processes) do
    if now > each.seen + FORGOTTEN then
      ledger.processes[name] = nil
    elseif now > each.seen + LIVES then
      each.holds = {}
    end
  end
  local settling, granted = now < ledger.settled_at, {}
  for index, asked in ipairs(limits) do
    granted[index] = grant(asked, me, changed, settling)
  end
  return keep_and_answer(settling, granted)
end

local function exchange_with_what_is_kept()
  local packed = redis.call('GET', KEYS[1])
  ledger = packed and cmsgpack.unpack(packed) or new_ledger()
  assert(type(ledger.epoch) == 'string')
  return exchange()
end

local done, answer = pcall(exchange_with_what_is_kept)
if not done then  -- what is kept there is no ledger: a new one takes its place, as if there were nothing
  ledger = new_ledger()
  answer = exchange()
end
return answer
