-- window: the starts of the last window, their pace, and the slack of a grant. Part of sync.lua.

-- Even pacing, as in GCRA: a start moves the next one by an interval. One that comes late does not push
-- back those after it, up to CATCH_UP of the window (50 ms of a minute). The slack is in the interval
-- because a stamp leaves the window that much after its grant. Made only by a call to a gate that has a pace.
local CATCH_UP = 1200

local function pace()
  local even = {}
  local interval = math.ceil((state.window + state.slack) / gate.rate)

  local function next_start() return math.max(state.next_start, now - math.floor(state.window / CATCH_UP)) end

  -- Starts that the pace allows now.
  function even.due() return math.max(0, math.floor((now - next_start()) / interval) + 1) end

  function even.start(count) state.next_start = next_start() + count * interval end

  -- Starts were given back: the next one is due an interval after the last that is left.
  function even.give_back(slack)
    local last = redis.call('LINDEX', STARTS, -1)
    local due = last and tonumber(last) - math.floor(slack) + interval or 0
    state.next_start = math.min(state.next_start, due)
  end

  -- A raised rate counts at once.
  function even.follow_rate() state.next_start = math.min(state.next_start, now + interval) end

  return even
end

-- Starts that the window and its pace leave.
local function starts_left()
  if gate.rate == 0 then return math.huge end
  local left = gate.rate - gate.used
  return gate.paced and math.min(left, pace().due()) or left
end

-- Grants that a wake message brought after this call was composed are void: their starts come back. Returns how
-- many there were; as many places are the process's turn now, as they were when they were granted.
local function take_back_unheard()
  local unheard = 0
  for attempt, count, stamp in string.gmatch(record.pushed, '(%d+):(%d+):(%d+)') do
    if tonumber(attempt) > call.last_grant then
      unheard = unheard + tonumber(count)
      if stamp ~= '0' then redis.call('LREM', STARTS, count, stamp) end
    end
  end
  record.pushed = ''
  return unheard
end

-- Slack: a process that had to give grants back doubles it (at most 5 s); it decays by a sixteenth of
-- the time that passes, so that stamps stay in order.
local function tune_slack()
  local least = math.max(state.window / 240, 10000)
  local slack = math.max(least, state.slack)
  slack = math.max(least, slack - (now - state.slack_at) / 16)
  local before = slack
  if call.returned ~= '' then
    for stamp, count in string.gmatch(call.returned, '(%d+) (%d+)') do
      redis.call('LREM', STARTS, count, stamp)
    end
    if string.sub(call.returned, 1, 4) == 'late' then slack = math.min(5000000, slack * 2) end
  end
  if gate.paced and (call.returned ~= '' or gate.unheard > 0) then pace().give_back(before) end
  state.slack, state.slack_at = math.floor(slack), now
end

-- Forget the starts that are older than the window; returns how many are left.
local function trim_starts()
  local used = gate.logs and redis.call('LLEN', STARTS) or 0
  if used == 0 then return 0 end
  local edge = now - state.window
  local low, high = 0, used -- first index whose stamp is inside the window lies in [low, high]
  if tonumber(redis.call('LINDEX', STARTS, 0)) > edge then return used end
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tonumber(redis.call('LINDEX', STARTS, middle)) <= edge then low = middle + 1 else high = middle end
  end
  redis.call('LTRIM', STARTS, low, -1)
  return used - low
end

local function stamp_starts(count)
  if count == 0 or not gate.logs then return 0 end
  local stamp, list = now + state.slack, {}
  for i = 1, count do list[i] = whole(stamp) end
  local length = 0
  chunks(list, 1000, function(...) length = redis.call('RPUSH', STARTS, ...) end)
  if length == count then expire(STARTS) end
  if gate.paced then pace().start(count) end
  return stamp
end

-- The window as it is now, and the delayed runs that are due.
local function roll_window()
  gate.logs = gate.rate > 0 or state.rate > 0 -- also while the operator has lifted the rate: no start is forgotten
  gate.paced = gate.rate > 0 and state.even == 1
  gate.unheard = record.pushed == '' and 0 or take_back_unheard()
  tune_slack()
  if gate.paced then pace().follow_rate() end
  gate.used = trim_starts()
  if state.due > 0 and now >= state.due then claiming().release_due() end
end
