-- admit: the window, whose turn it is, and the claim of the jobs with the lowest places. Part of sync.lua.

-- Even pacing, as in GCRA: a start moves the next one by an interval. One that comes late does not push
-- back those after it, up to CATCH_UP of the window (50 ms of a minute). The slack is in the interval
-- because a stamp leaves the window that much after its grant.
local CATCH_UP = 1200

local function interval() return math.ceil((state.window + state.slack) / gate.rate) end

local function next_start() return math.max(state.next_start, now - math.floor(state.window / CATCH_UP)) end

-- Starts that the pace allows now.
local function due_starts()
  if state.even ~= 1 or gate.rate == 0 then return math.huge end
  return math.max(0, math.floor((now - next_start()) / interval()) + 1)
end

-- Starts were given back: the next one is due an interval after the last that is left.
local function unpace(slack)
  local last = redis.call('LINDEX', STARTS, -1)
  local due = last and tonumber(last) - math.floor(slack) + interval() or 0
  state.next_start = math.min(state.next_start, due)
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
  if (call.returned ~= '' or gate.unheard > 0) and state.even == 1 and gate.rate > 0 then unpace(before) end
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

-- Runs whose time has come go back to their own places, and those that wait for what is no time: at most
-- 500 of each per call.
local function release_due()
  if state.due == 0 or now < state.due then return end
  local ids = redis.call('ZRANGEBYSCORE', LATER, '-inf', whole(now), 'LIMIT', 0, 500)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LATER, whole(PARKED), '+inf', 'LIMIT', 0, 500)) do
    ids[#ids + 1] = id
  end
  for _, id in ipairs(ids) do
    local job = read_job(redis.call('HGET', JOBS, id))
    if job then
      redis.call('ZADD', queue_of(job.flow), whole(job.place), id)
      returned_flows[job.flow] = true
    else
      for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do -- its record is gone: to where the queue is now
        if redis.call('ZADD', queue_of(flow), 'XX', 'CH', whole(state.place), id) == 1 then returned_flows[flow] = true end
      end
    end
    redis.call('ZREM', LATER, id)
  end
  state.due = earliest_due()
end

-- Read once, and again after a ticket was taken or dropped.
local function first_ticket()
  if gate.first == nil then gate.first = state.waiting > 0 and redis.call('ZRANGE', TICKETS, 0, 0)[1] or false end
  return gate.first
end

local function take_ticket(process)
  state.ticket = state.ticket + 1
  gate.first = nil
  if redis.call('ZADD', TICKETS, whole(state.ticket), process) == 1 then
    state.waiting = state.waiting + 1
    if state.waiting == 1 then expire(TICKETS) end
  end
end

local function set_kind(of, kind)
  state.callers = state.callers + calls(kind) - calls(of.kind)
  of.kind = kind
end

local function drop_ticket(process, of)
  if of.kind ~= '-' and redis.call('ZREM', TICKETS, process) == 1 then
    state.waiting = state.waiting - 1
    gate.first = nil
  end
  set_kind(of, '-')
end

-- A head that was told to call and stays silent while something is free goes to the tail until it calls.
local function pass_over_silent_head()
  if state.waiting < 2 or gate.free <= 0 then return end
  local head = first_ticket()
  if head and head ~= me and head == state.woken and now > state.woken_due + GRACE then
    take_ticket(head)
    state.woken = ''
  end
end

local function fair_share()
  return math.max(1, math.ceil(math.floor(state.level) / math.max(1, state.active + 1)))
end

-- How many of the free places this process may take. Between processes it goes round by ticket; one
-- that finished something takes its next jobs in the same call up to its fair share.
local function turn()
  local free, ended = gate.free, gate.ended
  if call.leave or free <= 0 then return 0 end
  local others = state.waiting - (record.kind ~= '-' and 1 or 0)
  if others <= 0 then return free end
  local owed = math.min(gate.unheard, call.permits)
  if first_ticket() == me then return math.min(free, math.max(owed, fair_share())) end
  if owed > 0 then return math.min(free, owed) end
  if ended > 0 and call.permits == 0 and state.callers == 0 then
    return math.max(0, math.min(free, ended, fair_share() - record.held))
  end
  return 0
end

-- The waiting jobs with the lowest places among the flows this process knows: at most `count`, and
-- whether more are left.
local function lowest_places(count)
  local heap = {}
  for _, flow in ipairs(call.flows) do
    local rows = redis.call('ZRANGE', queue_of(flow), 0, count, 'WITHSCORES')
    for i = 1, #rows, 2 do
      local place = tonumber(rows[i + 1])
      if place >= PARKED then break end
      heap[#heap + 1] = { id = rows[i], place = place, flow = flow }
    end
  end
  if #call.flows > 1 then
    table.sort(heap, function(a, b) return a.place < b.place or (a.place == b.place and a.id < b.id) end)
  end
  local more = #heap > count and heap[count + 1].flow or nil
  for i = #heap, count + 1, -1 do heap[i] = nil end
  return heap, more
end

local WIDTH = 7 -- values per job of an answer

local function add_claimed(claimed, id, job, payload)
  local n = #claimed
  claimed[n + 1], claimed[n + 2], claimed[n + 3] = id, whole(job.attempt), job.deaths
  claimed[n + 4], claimed[n + 5] = job.refused, job.backs
  claimed[n + 6] = job.saved == BESIDE and 'beside' or not job.new and redis.call('HGET', SAVED, id) or ''
  claimed[n + 7] = payload
end

-- Claim the chosen jobs: attempt, record, parked place, in-progress mark. A job whose payload is gone
-- ends as lost.
local function claim(chosen)
  local claimed = { '', '', '' } -- header, override and refused ids of the answer come first
  if #chosen == 0 then return claimed end
  local ids, payload_keys = {}, {}
  for i, c in ipairs(chosen) do ids[i], payload_keys[i] = c.id, 'arq:job:' .. c.id end
  local payloads = redis.call('MGET', unpack(payload_keys))
  local known = redis.call('HMGET', JOBS, unpack(ids))
  changed = no_changes()
  batches = {}
  for i, c in ipairs(chosen) do
    local job = read_job(known[i]) or { deaths = 0, refused = 0, backs = 0, saved = INLINE, place = c.place, flow = c.flow, new = true }
    state.attempt = state.attempt + 1
    job.attempt = state.attempt
    if payloads[i] then
      SETTLE.keep(c.id, job)
      add_claimed(claimed, c.id, job, payloads[i])
    else
      record_outcome(c.id, whole(job.attempt), 'lost', '')
      forget(c.id, c.flow)
      drop_saved(c.id, job)
    end
    state.place = math.max(state.place, c.place)
  end
  write_changes()
  close_batches()
  return claimed
end

local function stamp_starts(count)
  if count == 0 or not gate.logs then return 0 end
  local stamp, list = now + state.slack, {}
  for i = 1, count do list[i] = whole(stamp) end
  local length = 0
  chunks(list, 1000, function(...) length = redis.call('RPUSH', STARTS, ...) end)
  if length == count then expire(STARTS) end
  if state.even == 1 and gate.rate > 0 then state.next_start = next_start() + count * interval() end
  return stamp
end

-- The window as it is now, and the delayed runs that are due.
local function roll_window()
  gate.logs = gate.rate > 0 or state.rate > 0 -- also while the operator has lifted the rate: no start is forgotten
  gate.unheard = record.pushed == '' and 0 or take_back_unheard()
  tune_slack()
  if state.even == 1 and gate.rate > 0 then state.next_start = math.min(state.next_start, now + interval()) end -- a raised rate counts at once
  gate.used = trim_starts()
  release_due()
end

-- A place that is kept for another process is not given. One kept for us ends with this call: it is ours if
-- the call asks for several gates, and may be kept anew; else nobody here waits for several any more.
local function find_kept()
  if state.kept_for == 0 then return false end
  local ours = state.kept_for == record.number and (gate.several or not call.stand)
  if ours or now >= state.kept_until then state.kept_for = 0 else gate.kept = 1 end
  return ours and gate.several
end

-- How many places this process may take just now: what is free, if it is its turn.
local function places()
  gate.closed_until = math.max(state.pause, gate.opens, gate.held_until)
  gate.free = now < gate.closed_until and 0 or math.floor(state.level) - state.in_use
  if gate.rate > 0 then gate.free = math.min(gate.free, gate.rate - gate.used, due_starts()) end
  local mine = find_kept()
  gate.free = gate.free - gate.kept
  pass_over_silent_head()
  return mine and math.max(turn(), math.min(1, gate.free)) or turn()
end

-- From now on a place is left free for this process, so that it gets it together with another gate's.
local function keep_place()
  if gate.keep_us == 0 then return end
  state.kept_for, state.kept_until = record.number, now + gate.keep_us
  gate.kept, gate.free = gate.kept + 1, gate.free - 1
end

-- Take them: permits that other gates give too, then permits, then the jobs with the lowest places.
local function take(cap)
  local alone = math.min(call.permits, cap - gate.together)
  gate.permits = gate.together + alone
  state.attempt = state.attempt + gate.permits
  gate.permit_attempt = state.attempt
  local count = math.min(call.jobs, cap - gate.permits)
  local chosen = {}
  if call.jobs > 0 then chosen, gate.more = lowest_places(count) end
  gate.claimed = claim(chosen)
  gate.jobs = (#gate.claimed - 3) / WIDTH
  gate.gone = #chosen - gate.jobs
  gate.given = gate.permits + gate.jobs
  gate.stamp = stamp_starts(gate.given)
  if gate.given > 0 then state.admitted, record.since = now, now end
  if gate.logs then gate.used = gate.used + gate.given end
  record.held = record.held + gate.given
  state.in_use = state.in_use + gate.given
  if state.in_use > state.peak then state.peak = state.in_use end
  gate.free = gate.free - gate.given
  keep_place()
  gate.wants = call.permits - alone
  gate.refuses = gate.stands or call.stand or gate.wants > 0 or (gate.more ~= nil and count < call.jobs)
end

-- Who was refused by the gate waits by ticket; who got part of it, at the tail.
local function queue_up()
  record.want = gate.more and 0 or gate.wants -- one that was refused jobs too must call: a grant would not be all
  if not gate.refuses then return drop_ticket(me, record) end
  if gate.given > 0 or record.kind == '-' then take_ticket(me) end
  set_kind(record, (gate.stands or call.stand) and 's' or gate.wants > 0 and 'p' or 'j')
end
