-- admit: whose turn it is, and what it gets. Part of sync.lua.

-- Read once, and again after the first ticket was given up.
local function first_ticket()
  if gate.first == nil then gate.first = state.waiting > 0 and redis.call('ZRANGE', TICKETS, 0, 0)[1] or false end
  return gate.first
end

local function take_ticket(process)
  state.ticket = state.ticket + 1
  if not gate.first or gate.first == process then gate.first = nil end
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
    if gate.first == process then gate.first = nil end
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

-- Whether a job that only other processes know stands before all that this one knows.
local function others_are_first()
  if state.flows <= flow_count then return false end
  local known, ours, theirs = {}, math.huge, PARKED
  for _, flow in ipairs(call.flows) do known[flow] = true end
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
    local first = tonumber(redis.call('ZRANGE', queue_of(flow), 0, 0, 'WITHSCORES')[2]) or PARKED
    if known[flow] then ours = math.min(ours, first) else theirs = math.min(theirs, first) end
  end
  return theirs < math.min(ours, PARKED)
end

-- How many of the free places this process may take. Between processes it goes round by ticket; one
-- that finished something takes its next jobs in the same call up to its fair share, unless a flow that it does
-- not know would wait for ever.
local function turn()
  local free, ended = gate.free, gate.ended
  if call.leave or free <= 0 then return 0 end
  local others = state.waiting - (record.kind ~= '-' and 1 or 0)
  if others <= 0 then return free end
  local owed = math.min(gate.unheard, call.permits)
  if first_ticket() == me then return math.min(free, math.max(owed, fair_share())) end
  if owed > 0 then return math.min(free, owed) end
  if ended > 0 and call.permits == 0 and state.callers == 0 and not others_are_first() then
    return math.max(0, math.min(free, ended, fair_share() - record.held))
  end
  return 0
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
  gate.free = math.min(gate.free, starts_left())
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
  gate.claimed = { '', '', '' } -- header, override and refused ids of the answer come first
  local chosen = call.jobs > 0 and claiming().claim(count) or 0
  gate.jobs = (#gate.claimed - 3) / WIDTH
  gate.gone = chosen - gate.jobs
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
