-- control: what an operator asks of a limit, in force from the next call of every process on. Decides
-- nothing about who is admitted; forgets no start and no slot in use.
--
-- KEYS     as in gate.lua; ARGV[1] '', ARGV[2] now
-- ARGV[3]  act      set | clear | pause | resume | reset | repair
-- ARGV[4]  by       who asks, one word
-- ARGV[5]  request  id of this command; the same again changes nothing and gets the same answer
-- ARGV[6]  set: max ('' = leave it); pause: us ('' = until resumed)
--          repair: a key beside the gate, such as queue:<flow>, its type, the next one, ...
-- ARGV[7]  set: rate ('' = leave it, 0 = none)
--
-- Returns {alive, now, override, max, rate, max before, rate before, paused until before, level before, repaired}
--   alive 1 = the gate exists; without one the word is kept and holds once there is a gate
--   repaired  names of the keys that were of another type or held nonsense; they are gone or mended
-- `set` and `pause` add to each other; `clear` ends the one, `resume` the other and the provider's pause.
-- Who waits at the head is told, so that the change is in force at once. Cost: O(1); repair: O(state).

local act, by, request = ARGV[3], ARGV[4], ARGV[5]
local healing, rule = healer(), rules()

-- The text of an override as a list of its twelve words.
local function words_of(text)
  local words = {}
  if rule.read_override(text) then
    for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
  end
  if #words ~= 12 then words = { '-', '-', '-', '0', '-', '-', '-', '-', '-', '-', '-', '-' } end
  return words
end

-- What stands in keys of another type cannot be read at all; it is dropped before anything is loaded.
local function drop_what_cannot_be_read()
  local dropped, beside = {}, {}
  for i = 6, #ARGV, 2 do beside[#beside + 1], beside[#beside + 2] = ROOT .. ARGV[i], ARGV[i + 1] end
  local lost = healing.drop_wrong(healing.STATE_KEYS)
  for _, list in ipairs({ lost, healing.drop_wrong(healing.SIDE_KEYS), healing.drop_wrong(beside) }) do
    for _, name in ipairs(list) do dropped[#dropped + 1] = name end
  end
  return dropped, #lost > 0
end

local repaired, lost = {}, false
if act == 'repair' then repaired, lost = drop_what_cannot_be_read() end

local state = load('')
local now = clock(state)
local alive = state.gen > 0
if state.poisoned then
  repaired[#repaired + 1] = healing.heal(state, now, 0)
  alive = state.gen > 0
end
if alive then extend_after_stall(state, now) end
local text = alive and state.override or redis.call('GET', OVERRIDE) or ''
local words = words_of(text)
local said = rule.read_override(text) or {}
local max, rate = said.max or state.max, said.rate or state.rate
local paused_until = math.max(state.pause, said.pause or 0)
local level = state.level

local function one_of(word, instead) return word == '' and instead or word end

-- The level as it is before the first override, so that `clear` can bring it back.
local function level_word()
  if words[10] ~= '-' then return words[10] end
  return state.level >= state.ceiling and 'top' or exact(state.level)
end

local function values(of_max, of_rate)
  return 'max ' .. (of_max == 0 and '-' or exact(of_max)) .. ', rate ' .. (of_rate == 0 and 'none' or exact(of_rate))
end

local ACTS = {
  set = function()
    words[10] = level_word()
    words[1], words[2] = one_of(ARGV[6], words[1]), one_of(ARGV[7], words[2])
    words[6], words[7], words[8], words[9] = whole(now), by, exact(max), exact(rate)
    event(now, 'override', 'set by an operator', values(max, rate),
      values(tonumber(words[1]) or max, tonumber(words[2]) or rate), by)
  end,
  clear = function()
    if words[1] == '-' and words[2] == '-' then return end
    if state.ceiling > 0 and state.level >= state.ceiling and words[1] ~= '-' then
      state.level = math.min(state.max, math.max(state.level, tonumber(words[10]) or state.max))
      state.ceiling = state.max
    end
    event(now, 'clear', 'override ended by an operator', values(max, rate), values(state.max, state.rate), by)
    words[1], words[2] = '-', '-'
    for i = 6, 10 do words[i] = '-' end
  end,
  pause = function()
    words[3] = ARGV[6] == '' and whole(FOREVER) or whole(math.min(FOREVER, now + tonumber(ARGV[6])))
    words[11], words[12] = whole(now), by
    event(now, 'pause', 'asked for by an operator', '0',
      ARGV[6] == '' and 'until resumed' or exact(tonumber(ARGV[6]) / 1000000), by)
  end,
  resume = function()
    if paused_until > now then
      event(now, 'resume', 'pause ended by an operator', words[12] == '-' and 'provider' or words[12], '', by)
    end
    words[3], words[11], words[12], state.pause = '-', '-', '-', math.min(state.pause, now)
  end,
  reset = function()
    if alive then rule.reset_level(state, now, 'asked for by an operator', by) end
  end,
  repair = function()
    if healing.mend_starts(state, now) then repaired[#repaired + 1] = 'starts' end
    if #repaired > 0 then event(now, 'repaired', 'poisoned', table.concat(repaired, ','), '', by) end
    for i = 6, #ARGV, 2 do
      local flow = string.match(ARGV[i], '^queue:(.+)$')
      if flow and redis.call('EXISTS', LATER) == 0 then healing.requeue_delayed(state, flow) end
    end
    if lost then healing.hold_as_after_a_loss(state) end
  end,
}

-- Whoever waits first is told now and passes the word on; one that is gone goes to the tail.
local function wake_head()
  for _, head in ipairs(redis.call('ZRANGE', TICKETS, 0, 3)) do
    state.woken, state.woken_due = head, now
    if publish(head, 0) > 0 then return end
    state.ticket = state.ticket + 1
    redis.call('ZADD', TICKETS, whole(state.ticket), head)
  end
end

if request ~= words[5] then
  ACTS[act]()
  if act ~= 'reset' and act ~= 'repair' then
    words[4] = whole(math.max(now, tonumber(words[4]) + 1))
    words[5] = request
    text = table.concat(words, ' ')
    rule.keep_override(text, now)
    if alive then state.override = text end
  end
  wake_head()
  if alive or #repaired > 0 then save(state) end
end
local word = rule.read_override(text) or {}
return { alive and 1 or 0, whole(now), text, exact(word.max or state.max), exact(word.rate or state.rate), exact(max),
  exact(rate), whole(paused_until), exact(level), table.concat(repaired, ',') }
